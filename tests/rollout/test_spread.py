"""A model whose layers lie on several devices samples what it samples on one; the devices are labels (two_devices.py)."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from two_devices import Devices, label, put

from kitae.config import ModelSettings, SamplingSettings
from kitae.errors import PlanError
from kitae.models import estimate, placement
from kitae.models.load import load_policy
from kitae.rollout.generic import GenericEngine
from kitae.types import Problem

GIB = 2**30


def fake_backend(monkeypatch, *, room):
    """A kind of device of which the machine has several, with this much memory each."""
    from kitae import backends

    class Several:
        def count(self):
            return len(room)

        def device(self, number):
            return torch.device("cuda", number)

        def memory(self, device):
            return room[device.index], room[device.index]

    monkeypatch.setattr(backends, "of", lambda device: Several())


@pytest.mark.parametrize(
    ("sizes", "outside", "room", "counts"),
    [
        ([10] * 4, 10, [40, 40], [2, 2]),
        ([10] * 8, 20, [100, 100], [3, 5]),
        ([10] * 6, 0, [20, 80], [1, 5]),
        ([10] * 3, 0, [30, 30, 30], [1, 1, 1]),
        ([50, 10, 10], 10, [60, 60], [1, 2]),
        ([10] * 4, 10, [20, 20], None),
        ([10], 50, [40, 400], None),
    ],
)
def test_layers_are_spread_so_that_the_fullest_device_is_as_empty_as_can_be(sizes, outside, room, counts):
    assert placement.balance(sizes, outside=outside, room=room) == counts


@pytest.mark.parametrize("family", ["qwen3", "llama", "deepseek_v3"])
def test_a_model_larger_than_one_device_is_placed_whole(family, tiny, monkeypatch):
    from transformers import AutoConfig

    meta = estimate.build_on_meta(AutoConfig.from_pretrained(tiny(family, num_hidden_layers=4)))
    plan = estimate.Plan(dtype=torch.float32, trainable=False)
    size = estimate.estimate(meta, plan).weight_bytes
    fake_backend(monkeypatch, room=[int(size * 0.8)] * 2)
    places = placement.spread(meta, plan, device=torch.device("cuda", 0), name="m")
    assert {str(places[f"model.layers.{i}"]) for i in range(4)} == {"cuda:0", "cuda:1"}
    assert {str(places[n]) for n in ("model.embed_tokens", "model.norm", "lm_head")} == {"cuda:0"}
    for name, _ in [*meta.named_parameters(), *meta.named_buffers()]:
        assert any(name.startswith(f"{owner}.") for owner in places), name
    fake_backend(monkeypatch, room=[size * 2] * 2)
    assert placement.spread(meta, plan, device=torch.device("cuda", 0), name="m") is None, "one holds it"
    fake_backend(monkeypatch, room=[size // 4] * 2)
    with pytest.raises(PlanError, match="does not fit layer by layer"):
        placement.spread(meta, plan, device=torch.device("cuda", 0), name="m")


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_a_spread_model_samples_the_same_tokens(family, tiny, monkeypatch):
    model = tiny(family, num_hidden_layers=4)
    policy = load_policy(ModelSettings(name_or_path=str(model), dtype="float32"), trainable=False)
    problems = [Problem(prompt="", token_ids=list(range(20, 20 + n)), index=n) for n in (5, 9, 3)]

    def sampled():
        engine = GenericEngine(policy, stop_ids=[2], decode=lambda ids: "", max_rows=4)
        settings = SamplingSettings(max_new_tokens=12, temperature=0.8, top_p=0.9, repetition_penalty=1.1)
        groups = engine.generate(problems, n=3, sampling=settings, seed=0)
        return [(r.token_ids, r.logprobs) for group in groups for r in group]

    alone = sampled()
    assert len({tuple(ids) for ids, _ in alone}) > 3
    size = estimate.estimate(policy.causal_lm, plan := estimate.Plan(dtype=torch.float32, trainable=False))
    fake_backend(monkeypatch, room=[int(size.weight_bytes * 0.8)] * 2)
    places = placement.spread(policy.causal_lm, plan, device=torch.device("cuda", 0), name="m")
    monkeypatch.undo()
    for name, place in places.items():
        module = policy.causal_lm.get_submodule(name)
        put([*module.parameters(), *module.buffers()], place)
        hook = AlignDevicesHook(execution_device=place)  # as from_pretrained puts them on for such a map
        hook.init_hook = lambda module: module
        add_hook_to_module(module, hook)
    with Devices() as devices:
        for (ids, logprobs), (own_ids, own_logprobs) in zip(sampled(), alone, strict=True):
            assert ids == own_ids and logprobs == pytest.approx(own_logprobs, abs=1e-5)
        assert devices.computed == {"cuda:0", "cuda:1"}
        layer = policy.layers[3]
        assert label(next(layer.parameters())) == torch.device("cuda", 1)
        with pytest.raises(RuntimeError, match="on tensors of"):
            next(layer.parameters()) + policy.causal_lm.get_input_embeddings().weight[:1]
