"""Several adapters on one base, chosen by name and side by side, each as if it were served alone."""

import asyncio

import pytest
from serving import Running

from kitae.config import LoraSettings, ModelSettings
from kitae.errors import ConfigError, ModelError

ASK = {"messages": [{"role": "user", "content": "2+2"}], "max_tokens": 20, "seed": 5, "temperature": 1}


def make_adapter(model, folder, *, seed, targets="all-linear", rank=4):
    """An adapter whose B is not zero, saved as training saves it."""
    import torch

    from kitae.models.load import load_policy
    from kitae.models.save import save_policy

    settings = ModelSettings(name_or_path=str(model), dtype="float32")
    policy = load_policy(settings, lora=LoraSettings(rank=rank, target_modules=targets, init_seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.causal_lm.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_policy(policy, folder)
    return folder


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_adapters_are_chosen_by_name_and_do_not_touch_each_other(family, tiny, tmp_path):
    model = tiny(family)
    targets = "all-linear" if family == "deepseek_v3" else ["q_proj", "v_proj"]
    adapters = {
        "first": make_adapter(model, tmp_path / "first", seed=1),
        "second": make_adapter(model, tmp_path / "second", seed=2, targets=targets, rank=2),
    }
    served = {"tiny": model, **adapters}
    alone = {}
    for name, path in served.items():
        server = Running(path)
        try:
            alone[name] = (
                server.client().chat.completions.create(model="tiny", **ASK).choices[0].message.content
            )
        finally:
            server.close()
    assert len(set(alone.values())) == 3
    server = Running(model, adapters=adapters)
    try:
        listed = {m.id: getattr(m, "parent", None) for m in server.client().models.list()}
        assert listed == {"tiny": None, "first": "tiny", "second": "tiny"}

        async def together():
            async with server.aclient() as client:
                names = list(alone) * 3
                answers = await asyncio.gather(
                    *(client.chat.completions.create(model=n, **ASK) for n in names)
                )
                return [(n, a.choices[0].message.content) for n, a in zip(names, answers, strict=True)]

        for name, said in asyncio.run(together()):
            assert said == alone[name], name
    finally:
        server.close()


def test_adapters_that_do_not_fit_are_named(tiny, tmp_path):
    model = tiny("qwen3")
    good = make_adapter(model, tmp_path / "good", seed=1)
    other = make_adapter(tiny("qwen3", hidden_size=32), tmp_path / "other", seed=1)
    deeper = make_adapter(tiny("qwen3", num_hidden_layers=3), tmp_path / "deeper", seed=1)
    shallower = make_adapter(tiny("qwen3", num_hidden_layers=1), tmp_path / "shallower", seed=1)
    (tmp_path / "empty").mkdir()
    for adapters, error, said in [
        ({"bad": other}, ModelError, "--adapter bad: .* does not fit this model: .*size mismatch"),
        (
            {"model": deeper},
            ModelError,
            "14 of its tensors have no place there and 0 are missing, .*layers.2",
        ),
        ({"a": good, "q": shallower}, ModelError, "0 of its tensors have no place there and 14 are missing"),
        ({"none": tmp_path / "empty"}, ModelError, "has no adapter_config.json"),
        ({"tiny": good}, ConfigError, "the model itself has this name"),
        ({"a.b": good}, ConfigError, "cannot hold a dot"),
        ({"train": good}, ConfigError, "torch has this word for itself"),
    ]:
        with pytest.raises(error, match=said):
            Running(model, adapters=adapters)
    with pytest.raises(ConfigError, match="the model is an adapter itself"):
        Running(good, adapters={"good": good})
