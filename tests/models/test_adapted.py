"""Adapted linears against their formula through autograd, and what their backward does not compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kitae.config import LoraSettings, SeamSettings
from kitae.models.adapted import adapted_linears, install
from tests.models.conftest import batch_of, random_row

R = 4
ROWS = [random_row(n) for n in (37, 5, 2, 64)]


def randomise(policy) -> None:
    """Adapters as after some training; a fresh one changes nothing because its B is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in policy.named_trainable():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def adapter_grads(policy, batch) -> dict[str, torch.Tensor]:
    logprobs, *_ = policy(batch)
    (logprobs * batch.weights_N).sum().backward()
    return {name: parameter.grad for name, parameter in policy.named_trainable()}


def plain_output(layer, x):
    """x W^T + b + s (x A^T) B^T."""
    low = x @ layer.lora_A["default"].weight.t() @ layer.lora_B["default"].weight.t()
    return F.linear(x, layer.base_layer.weight, layer.base_layer.bias) + layer.scaling["default"] * low


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("names", [["q_proj", "k_proj", "v_proj"], ["o_proj"]])
def test_values_and_gradients_equal_the_formula(names, rows, dtype, tolerance, policy_of):
    # Its queries, keys and values have biases.
    policy = policy_of("qwen2", lora=LoraSettings(rank=R, alpha=6))
    randomise(policy)
    attention = policy.causal_lm.model.layers[1].self_attn.to(dtype)
    layers = [getattr(attention, name) for name in names]
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, layers[0].in_features, generator=generator).to(dtype).requires_grad_()
    found, expected = adapted_linears(layers, x), [plain_output(layer, x) for layer in layers]
    directions = [torch.randn(y.shape, generator=generator).to(dtype) for y in expected]
    trained = [m.weight for layer in layers for m in (layer.lora_A["default"], layer.lora_B["default"])]
    theirs = torch.autograd.grad(expected, [x, *trained], directions)
    ours = torch.autograd.grad(found, [x, *trained], directions)
    for ours_one, theirs_one in zip([*found, *ours], [*expected, *theirs], strict=True):
        assert ours_one.dtype == dtype
        assert (ours_one - theirs_one).abs().max() <= tolerance * theirs_one.abs().max()


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_the_backward_computes_no_frozen_gradient_and_none_below_the_first_adapter(policy_of):
    policy = policy_of("qwen3", lora=LoraSettings(rank=R))
    batch = batch_of(ROWS)
    with Products() as forward:
        hidden = policy.predicting(batch)
    with Products() as backward:
        hidden.sum().backward()
    adapted = {n: m for n, m in policy.causal_lm.named_modules() if hasattr(m, "lora_A")}
    assert len(adapted) == 14
    sizes = {n: (m.in_features, m.out_features) for n, m in adapted.items()}
    first = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")
    with_input = {n: size for n, size in sizes.items() if not n.endswith(first)}
    tokens = batch.packing.num_tokens
    assert forward.count == tokens * sum(i * o + R * (i + o) for i, o in sizes.values())
    of_adapters = sum(R * (i + 2 * o) for i, o in sizes.values())  # dA; dY B and dB
    of_inputs = sum(i * o + R * i for i, o in with_input.values())
    assert backward.count == tokens * (of_adapters + of_inputs)


def test_linears_of_one_input_are_computed_at_once_and_each_alone_where_inputs_differ(policy_of):
    policy = policy_of("llama", lora=LoraSettings(rank=R))
    randomise(policy)
    mlp = policy.causal_lm.model.layers[0].mlp
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(1, 7, mlp.gate_proj.in_features, generator=generator) for _ in range(2))
    with torch.no_grad():
        gate = mlp.gate_proj(x)
        with Products() as products:
            up = mlp.up_proj(x)
        assert products.count == 0
        mlp.gate_proj(x)
        away = mlp.up_proj(other)
    for found, layer, read in ((gate, mlp.gate_proj, x), (up, mlp.up_proj, x), (away, mlp.up_proj, other)):
        torch.testing.assert_close(found, plain_output(layer, read), rtol=1e-5, atol=1e-5)


def test_linears_that_read_inputs_of_other_sizes_are_no_group():
    """Cross-attention: queries of the text, keys of something else."""
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 6), "k_proj": nn.Linear(12, 6)}).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=R, target_modules=["q_proj", "k_proj"]), model)
    install(model)
    for layer in model.values():
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), plain_output(layer, x))


def test_weights_of_one_input_lie_behind_each_other_and_keep_their_values(policy_of, plain_model):
    policy, model = policy_of("qwen3", lora=LoraSettings(rank=R)), plain_model("qwen3")
    mlp = policy.causal_lm.model.layers[0].mlp
    gate, up = mlp.gate_proj.base_layer.weight, mlp.up_proj.base_layer.weight
    assert up.data_ptr() == gate.data_ptr() + gate.nbytes
    plain = dict(model.named_parameters())
    for name, parameter in policy.causal_lm.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, plain[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_recomputing_activations_changes_no_adapters_gradient(family, policy_of):
    found = []
    for recomputes in (False, True):
        policy = policy_of(family, lora=LoraSettings(rank=R), gradient_checkpointing=recomputes)
        randomise(policy)
        found.append(adapter_grads(policy, batch_of(ROWS)))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-6, atol=1e-7)


def test_nothing_is_kept_alive_after_a_backward_that_recomputes(policy_of):
    """torch ends the second forward of a layer by an exception in the middle of its last adapted linear."""
    policy = policy_of("qwen3", lora=LoraSettings(rank=R), gradient_checkpointing=True)
    adapter_grads(policy, batch_of(ROWS))
    adapted = [m for m in policy.causal_lm.modules() if hasattr(m, "shared_input")]
    assert len(adapted) == 14
    assert all(m.shared_input._input is None and not m.shared_input._waiting for m in adapted)


def test_dropout_falls_on_the_adapters_input_in_training_only(policy_of):
    policy = policy_of("qwen3", lora=LoraSettings(rank=R, dropout=0.5))
    randomise(policy)
    layer = policy.causal_lm.model.layers[0].self_attn.q_proj
    x = torch.ones(1, 3, layer.in_features)
    policy.train()
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    kept = nn.functional.dropout(x, 0.5)
    low = kept @ layer.lora_A["default"].weight.t() @ layer.lora_B["default"].weight.t()
    expected = F.linear(x, layer.base_layer.weight) + layer.scaling["default"] * low
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    policy.eval()
    torch.testing.assert_close(layer(x), plain_output(layer, x), rtol=1e-5, atol=1e-6)


def test_4_bit_weights_have_the_adapter_gradients_of_their_dequantized_values(tiny, policy_of):
    bnb = pytest.importorskip("bitsandbytes")
    folder = tiny("qwen3", hidden_size=128)
    lora, seams = LoraSettings(rank=R), SeamSettings()
    policy = policy_of("qwen3", path=folder, quantization="nf4", lora=lora, seams=seams)
    plain = policy_of("qwen3", path=folder, lora=lora, seams=seams)
    randomise(policy)
    randomise(plain)
    count = 0
    with torch.no_grad():
        for name, module in policy.causal_lm.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.causal_lm.get_submodule(name).weight.copy_(weight)
                count += 1
    assert count == 14
    expected = adapter_grads(plain, batch_of(ROWS))
    for name, grad in adapter_grads(policy, batch_of(ROWS)).items():
        assert (grad - expected[name]).abs().max() < 1e-4 * expected[name].abs().max(), name
