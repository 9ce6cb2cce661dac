"""A LoRA policy's frozen start adapter: the reference at first, and the policy after it was renewed."""

import pytest
import torch

from kitae.config import LoraSettings, ModelSettings
from kitae.data.collate import collate
from kitae.models import frozen
from kitae.models.load import load_policy
from kitae.types import Row

FAMILIES = ["qwen3", "deepseek_v3"]


def score(policy):
    row = Row(token_ids=[5, 9, 40, 41, 7], loss_mask=[False, True, True, True, True])
    (batch,) = collate([row], rows_per_forward=1)
    policy.eval()
    with torch.no_grad():
        return policy(batch).logprobs_N


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_adapter_is_the_model_without_one_until_it_is_renewed(family, quantization, tiny):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    # 4-bit weights of fused experts cannot be adapted: attention only.
    targets = "all-linear" if quantization == "none" else ["o_proj"]
    policy = frozen.load_keeping_start(
        ModelSettings(name_or_path=str(tiny(family)), dtype="float32", quantization=quantization),
        lora=LoraSettings(rank=4, target_modules=targets),
    )
    assert not any(".reference." in name for name, _ in policy.named_trainable())
    with policy.without_adapter():
        base = score(policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in policy.named_trainable():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    weights = frozen.RenewedWeights(lambda: frozen.adapter_pairs(policy))
    trained = score(policy)
    assert not torch.allclose(trained, base, atol=1e-3)
    with policy.reference():
        torch.testing.assert_close(score(policy), base)
    before = {name: tensor.clone() for name, tensor in weights.state().items()}
    weights.renew()
    with policy.reference():
        assert torch.equal(score(policy), trained)
    assert torch.equal(score(policy), trained)
    weights.load_state(before)
    with policy.reference():
        torch.testing.assert_close(score(policy), base)


def test_the_kept_start_is_not_counted_saved_or_trained(tiny, tmp_path):
    from kitae.models.lora import coverage
    from kitae.models.save import save_policy

    model, lora = ModelSettings(name_or_path=str(tiny("qwen3")), dtype="float32"), LoraSettings(rank=4)
    plain, kept = load_policy(model, lora=lora), frozen.load_keeping_start(model, lora=lora)
    assert coverage(kept.causal_lm) == coverage(plain.causal_lm)
    assert [n for n, _ in kept.named_trainable()] == [n for n, _ in plain.named_trainable()]
    for policy, folder in ((plain, tmp_path / "plain"), (kept, tmp_path / "kept")):
        folder.mkdir()
        save_policy(policy, folder)
    names = [sorted(p.name for p in (tmp_path / f).rglob("*") if p.is_file()) for f in ("plain", "kept")]
    assert names[0] == names[1]
    content = [(tmp_path / f / "adapter_model.safetensors").read_bytes() for f in ("plain", "kept")]
    assert content[0] == content[1]


def test_a_full_model_is_copied_into_its_frozen_second(tiny):
    model = ModelSettings(name_or_path=str(tiny("qwen3")), dtype="float32")
    policy, second = load_policy(model), load_policy(model, trainable=False)
    with torch.no_grad():
        for _, parameter in policy.named_trainable():
            parameter.mul_(1.1)
    weights = frozen.RenewedWeights(lambda: frozen.model_pairs(second, policy))
    start = score(second)
    assert not torch.allclose(start, score(policy), atol=1e-4)
    weights.renew()
    assert torch.equal(score(second), score(policy))
    assert set(weights.state()) == {name for name, _ in policy.named_trainable()}
