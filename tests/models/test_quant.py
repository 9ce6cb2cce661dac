"""Weights in fewer bits: NF4 by bitsandbytes, and block-scaled FP8 checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kitae.config import LoraSettings
from kitae.errors import ConfigError, ModelError
from kitae.models.lora import coverage
from kitae.models.quant import dequantize_fp8
from kitae.models.save import save_policy
from tests.models.conftest import batch_of, random_row

ROWS = [random_row(n) for n in (20, 9)]
BLOCK = 128


def slow_dequantize(weight, scale, block):
    """The definition, element by element: each weight times its block's scale."""
    out = torch.empty(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            out[i, j] = weight[i, j].float() * scale[i // block[0], j // block[1]]
    return out


@pytest.mark.parametrize("shape", [(8, 12), (9, 13), (3, 4)])
def test_fp8_blocks_are_scaled_as_defined_and_edges_may_be_smaller(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 4), -(-shape[1] // 4), generator=generator)
    found = dequantize_fp8(weight, scale, block=(4, 4), dtype=torch.float32)
    assert torch.equal(found, slow_dequantize(weight, scale, (4, 4)))


def test_scales_of_another_block_size_are_refused():
    with pytest.raises(ModelError, match=r"8 x 8 has \(2, 2\) scales"):
        dequantize_fp8(
            torch.zeros(8, 8).to(torch.float8_e4m3fn), torch.ones(2, 2), block=(8, 8), dtype=torch.float32
        )


def quantize_fp8(folder, target):
    """A checkpoint in DeepSeek-V3's released layout, and the plain values it stands for."""
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        plain[name] = tensor
        is_linear = (tensor.dim() == 2 and name.endswith("_proj.weight")) or "kv_a_proj" in name
        if not is_linear:
            stored[name] = tensor
            continue
        rows, columns = (-(-n // BLOCK) for n in tensor.shape)
        scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name))) * 0.02 + 0.001
        full = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[
            : tensor.shape[0], : tensor.shape[1]
        ]
        stored[name] = (tensor / full).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale
        plain[name] = stored[name].float() * full
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    return plain


def test_a_block_scaled_fp8_checkpoint_loads_as_the_plain_weights_it_stands_for(tiny, policy_of, tmp_path):
    # 72 and 150 rows are no multiples of the block, like kv_a_proj_with_mqa's 576 in DeepSeek-V3.
    folder = tiny("deepseek_v3", hidden_size=144, intermediate_size=150)
    (tmp_path / "fp8").mkdir()
    plain = quantize_fp8(folder, tmp_path / "fp8")
    assert any(".experts.0." in name for name in plain)
    policy = policy_of("deepseek_v3", path=tmp_path / "fp8")
    assert not hasattr(policy.config, "quantization_config")
    assert policy.causal_lm.generation_config.eos_token_id == 2

    save_policy(policy, tmp_path / "plain")
    saved = load_file(tmp_path / "plain" / "model.safetensors")
    assert saved.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(saved[name], tensor), name


def test_an_fp8_checkpoint_cannot_be_stored_in_four_bits_on_the_way(tiny, policy_of, tmp_path):
    quantize_fp8(tiny("qwen3"), tmp_path)
    with pytest.raises(
        ConfigError, match=r"model\.quantization is nf4, but the weights of .* are stored in FP8"
    ):
        policy_of("qwen3", path=tmp_path, quantization="nf4", lora=LoraSettings(rank=2))


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_nf4_stores_linears_in_four_bits_and_trains_an_adapter(family, tiny, policy_of):
    pytest.importorskip("bitsandbytes")
    import bitsandbytes as bnb

    folder = tiny(family, hidden_size=128)
    policy = policy_of(family, path=folder, quantization="nf4", lora=LoraSettings(rank=4))
    packed = [n for n, m in policy.causal_lm.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert any("o_proj" in n for n in packed)
    assert not any("lm_head" in n for n in packed)

    logprobs, *_ = policy(batch_of(ROWS))
    logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in policy.named_trainable())
    full = coverage(policy_of(family, path=folder, lora=LoraSettings(rank=4)).causal_lm)
    found = coverage(policy.causal_lm)
    assert [(r.target, r.adapted, r.layers) for r in found.rows] == [
        (r.target, r.adapted, r.layers) for r in full.rows
    ]
    assert (found.total, found.trainable) == (full.total, full.trainable)

    with torch.no_grad(), policy.without_adapter():
        low, *_ = policy(batch_of(ROWS))
        plain, *_ = policy_of(family, path=folder)(batch_of(ROWS))
    assert 1e-6 < (low - plain).abs().mean() < 0.1


def test_nf4_equals_the_plain_model_with_dequantized_weights(tiny, policy_of):
    bnb = pytest.importorskip("bitsandbytes")
    folder = tiny("qwen3", hidden_size=128)
    policy = policy_of("qwen3", path=folder, quantization="nf4", trainable=False)
    plain = policy_of("qwen3", path=folder, trainable=False)
    with torch.no_grad():
        for name, module in policy.causal_lm.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.causal_lm.get_submodule(name).weight.copy_(weight)
        torch.testing.assert_close(policy(batch_of(ROWS))[0], plain(batch_of(ROWS))[0], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_saved_in_four_bits_loads_as_it_is(tiny, policy_of, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = tiny("qwen3", hidden_size=128)
    first = policy_of("qwen3", path=folder, quantization="nf4", trainable=False)
    first.causal_lm.save_pretrained(tmp_path)
    again = policy_of("qwen3", path=tmp_path, lora=LoraSettings(rank=2))
    with torch.no_grad():
        torch.testing.assert_close(again(batch_of(ROWS))[0], first(batch_of(ROWS))[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"stored in 4 bits, which cannot train; set lora\.rank"):
        policy_of("qwen3", path=tmp_path)


def test_nf4_without_an_adapter_cannot_train(policy_of):
    with pytest.raises(ConfigError, match=r"set lora\.rank"):
        policy_of("qwen3", quantization="nf4")


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
    ],
)
def test_weights_stored_in_another_way_are_refused(stored, told, tiny, policy_of, tmp_path):
    for file in tiny("qwen3").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = stored
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"stored as '{told}'"):
        policy_of("qwen3", path=tmp_path)


def test_scoring_in_between_changes_no_gradient_of_a_4_bit_model(tiny, policy_of):
    pytest.importorskip("bitsandbytes")
    policy = policy_of(
        "qwen3", path=tiny("qwen3", hidden_size=128), quantization="nf4", lora=LoraSettings(rank=4)
    )

    def gradients():
        policy.train().zero_grad()
        policy(batch_of(ROWS)).logprobs_N.sum().backward()
        return [parameter.grad.clone() for _, parameter in policy.named_trainable()]

    before = gradients()
    with torch.no_grad():
        scored = policy.eval()(batch_of(ROWS)).logprobs_N
        trained = policy.train()(batch_of(ROWS)).logprobs_N
    torch.testing.assert_close(scored, trained)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
