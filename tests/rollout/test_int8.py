"""Sampling with 8-bit weights: the products against slow ones in torch, and the engine against the learner and itself."""

from __future__ import annotations

import ctypes
import functools
import platform
from ctypes import POINTER, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kitae import compiler
from kitae.config import LoraSettings, ModelSettings, SamplingSettings
from kitae.errors import NonFiniteError
from kitae.models.load import load_policy
from kitae.models.policy import Policy
from kitae.rollout import build, int8, structs
from kitae.rollout.native import NativeEngine
from kitae.rollout.packed import PackedModel
from kitae.rollout.structs import pointer
from kitae.types import Rollout
from tests.rollout import test_native, test_native_experts
from tests.rollout.test_generic import rows_of
from tests.rollout.test_native import (
    EDGES,
    STOP,
    bits,
    differences,
    policy_of,
    problems_of,
    require_same_bits_in_any_company,
    spell,
)

SHAPES = {
    "qwen3": test_native, "qwen2 with biases": test_native, "llama": test_native, "odd sizes": test_native,
    "v3": test_native_experts, "v3, odd sizes": test_native_experts, "v2, greedy": test_native_experts,
}  # fmt: skip
OLDER = ["-march=x86-64-v2", "-march=x86-64-v3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8")


def folder_of(root: Path, shape: str) -> Path:
    return SHAPES[shape].folder_of(root, shape)


def engine_of(policy: Policy, kernels: ctypes.CDLL, *, max_rows: int = 64) -> NativeEngine:
    return NativeEngine(
        policy, kernels=kernels, stop_ids=(STOP,), decode=spell, max_rows=max_rows, quantization="int8"
    )


# the products ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["-march=native", *OLDER])
def products(request: pytest.FixtureRequest, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch):
    """The compiled int8_sums.cpp, for this CPU and for older ones."""
    if request.param in OLDER and platform.machine() != "x86_64":
        pytest.skip("elsewhere the kernels are the portable ones anyway")
    flags = [f if not f.startswith("-march") else request.param for f in compiler.FLAGS]
    monkeypatch.setattr(compiler, "FLAGS", flags)
    source = compiler.Source(
        main=Path(__file__).with_name("int8_sums.cpp"),
        folders=[build.KERNELS],
        functions=["test_sums", "test_product"],
        purpose="test",
    )
    library = compiler.load_library(source)
    head = (POINTER(structs.Matrix), c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p)
    library.test_sums.argtypes, library.test_product.argtypes = head, (*head, c_int)
    library.test_sums.restype = library.test_product.restype = None
    return library


def slow_quantise(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as integers from -127 to 127 and the scale that makes them numbers again."""
    largest_R = x_RK.abs().amax(1).clamp(min=1e-30)
    return (x_RK * (127 / largest_R)[:, None]).round(), largest_R / 127


def slow_product(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """The product of 8-bit integers; float64 holds its sums exactly."""
    x, x_scale_R = slow_quantise(x_RK.float())
    w, w_scale_N = slow_quantise(weight_NK.float())
    return ((x.double() @ w.double().T).float() * x_scale_R[:, None] * w_scale_N).to(x_RK.dtype)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 512, 192), (1, 37, 5), (7, 101, 129), (128, 130, 64), (13, 16, 1)]
)
def test_products_have_the_same_integers_on_every_cpu_and_in_torch(
    root: Path, products: Any, rows: int, inputs: int, outputs: int
):
    torch.manual_seed(rows * inputs)
    x_RK = torch.randn(rows, inputs) * torch.logspace(-6, 6, rows)[:, None]
    x_RK[0, 0] = 0.0
    weight_NK = torch.randn(outputs, inputs) * torch.logspace(-3, 3, outputs)[:, None]
    weight_NK[-1] = 0
    bias_N = torch.randn(outputs)
    packed = PackedModel(policy_of(folder_of(root, "qwen3")), quantization="int8")
    matrix = packed._pack("here", [weight_NK], bias_N=bias_N)
    size = -(-inputs // 16) * 16
    padded = F.pad(x_RK, (0, size - inputs))
    integers = torch.zeros(rows, size, dtype=torch.uint8)
    scales, sums = torch.zeros(rows), torch.zeros(rows, matrix.columns, dtype=torch.int32)
    where = [pointer(padded), size, rows, pointer(integers), pointer(scales)]
    products.test_sums(matrix, *where, pointer(sums))
    expected_x, expected_scales = slow_quantise(x_RK)
    assert torch.equal(integers[:, :inputs].int() - 128, expected_x.int())
    assert torch.equal(scales, expected_scales)
    expected_w, _ = slow_quantise(weight_NK)
    expected = ((expected_x + 128).double() @ expected_w.double().T).long()
    assert torch.equal(sums[:, :outputs].long(), expected)
    assert not sums[:, outputs:].any()
    exact = slow_product(x_RK, weight_NK) + bias_N
    for threads in (1, 2):
        out = torch.full((rows, matrix.columns), torch.nan)
        products.test_product(matrix, *where, pointer(out), threads)
        torch.testing.assert_close(out[:, :outputs], exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
    far = (x_RK @ weight_NK.T + bias_N - exact).abs().max() / (exact.abs().max() + 1e-30)
    assert 0 <= far <= 0.05


def test_a_row_of_zeros_is_zero_and_what_is_not_finite_stays_so(root: Path, products: Any):
    packed = PackedModel(policy_of(folder_of(root, "qwen3")), quantization="int8")
    matrix = packed._pack("here", [torch.randn(64, 32)])
    x = torch.randn(4, 32)
    x[0], x[1, 5], x[2, 31] = 0, torch.nan, torch.inf
    integers, scales, out = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4), torch.zeros(4, 64)
    products.test_product(matrix, pointer(x), 32, 4, pointer(integers), pointer(scales), pointer(out), 1)
    assert not out[0].any()
    assert not out[1:3].isfinite().any()
    assert out[3].isfinite().all()


def test_weights_are_rounded_to_the_nearest_of_255_steps():
    torch.manual_seed(0)
    weight_NK = torch.randn(30, 50)
    weight_NK[4] = 0
    integers_NK, scales_N = int8.quantise(weight_NK)
    assert integers_NK.abs().amax(1).tolist() == [127] * 4 + [0] + [127] * 25
    error_NK = (integers_NK * scales_N[:, None] - weight_NK).abs()
    assert (error_NK <= scales_N[:, None] * 0.50001).all()


# the engine --------------------------------------------------------------------------------------------------------


def slow_int8_logprobs(
    folder: Path, groups: list[list[Rollout]], monkeypatch: pytest.MonkeyPatch
) -> list[list[float]]:
    """Log-probs of the completions by transformers' own module, whose layers multiply as slow_product does."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    kept = {
        tensor.data_ptr()
        for name, tensor in model.named_parameters()
        if name.endswith(("mlp.gate.weight", "kv_b_proj.weight"))
    }
    plain = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.data_ptr() in kept:
            return plain(x, weight, bias)
        out = slow_product(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    monkeypatch.setattr(F, "linear", linear)
    found = []
    with torch.no_grad():
        for row in rows_of(groups):
            ids = torch.tensor(row.token_ids)
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
            chosen = logprobs[:-1].gather(1, ids[1:, None])[:, 0]
            found.append(chosen[row.prompt_length - 1 :].tolist())
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_are_those_of_a_slow_model_of_the_same_integers(
    root: Path, kernels: ctypes.CDLL, shape: str, monkeypatch: pytest.MonkeyPatch
):
    """A sum that rounds otherwise can move one input by one of 255 steps, so a few numbers differ a little."""
    folder = folder_of(root, shape)
    problems, sampling = problems_of([1, 17, 40]), SamplingSettings(max_new_tokens=24)
    groups = engine_of(policy_of(folder), kernels).generate(problems, n=2, sampling=sampling, seed=3)
    with monkeypatch.context() as patched:
        slow = slow_int8_logprobs(folder, groups, patched)
    ours = [r.logprobs for group in groups for r in group]
    gaps = torch.cat([(torch.tensor(a) - torch.tensor(b)).abs() for a, b in zip(ours, slow, strict=True)])
    exact_gaps = differences(policy_of(folder), groups, temperature=1.0).abs()
    assert gaps.median().item() <= 2e-5
    assert gaps.mean().item() <= 0.1 * exact_gaps.mean().item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_differ_from_the_learners_by_little(
    root: Path, kernels: ctypes.CDLL, shape: str, dtype: str
):
    """By 0.04 to 0.06 on average, the largest by about 1: the random models' logits are spread over many units."""
    policy = policy_of(folder_of(root, shape), dtype=dtype)
    groups = engine_of(policy, kernels, max_rows=9).generate(
        problems_of(EDGES), n=4, sampling=SamplingSettings(max_new_tokens=30), seed=1
    )
    gaps = differences(policy, groups, temperature=1.0)
    assert 1e-4 <= gaps.abs().mean().item() <= 0.1
    assert abs(gaps.mean().item()) <= 0.05


@pytest.mark.parametrize(("shape", "dtype"), [("qwen3", "float32"), ("llama", "bfloat16"), ("v3", "float32")])
def test_a_completion_has_the_same_bits_in_any_company(
    root: Path, kernels: ctypes.CDLL, shape: str, dtype: str
):
    policy = policy_of(folder_of(root, shape), dtype=dtype)
    engine = functools.partial(engine_of, policy, kernels)
    require_same_bits_in_any_company(engine, max_new_tokens=24, mixes=34)


@pytest.mark.parametrize("shape", ["qwen3", "v3"])
def test_an_update_in_place_equals_weights_packed_anew(root: Path, kernels: ctypes.CDLL, shape: str):
    settings = ModelSettings(name_or_path=str(folder_of(root, shape)), dtype="bfloat16", device="cpu")
    policy = load_policy(settings, lora=LoraSettings(rank=4, alpha=8))
    engine = engine_of(policy, kernels)
    sampling = SamplingSettings(max_new_tokens=20)
    engine.sync()
    before = engine.generate(problems_of(EDGES), n=2, sampling=sampling, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_trainable():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.03)
    engine.sync()
    found = engine.generate(problems_of(EDGES), n=2, sampling=sampling, seed=0)
    assert bits(found) == bits(
        engine_of(policy, kernels).generate(problems_of(EDGES), n=2, sampling=sampling, seed=0)
    )
    assert bits(found) != bits(before)
    packed = [PackedModel(policy, quantization="int8") for _ in range(2)]
    with policy.without_adapter():
        packed[0].take(policy)
    for model in packed:
        model.take(policy)
    assert packed[0]._tensors.keys() == packed[1]._tensors.keys()
    for name, tensor in packed[0]._tensors.items():
        assert torch.equal(tensor, packed[1]._tensors[name]), name


def test_its_weights_take_half_the_memory_of_bfloat16(root: Path):
    policy = policy_of(test_native.folder_of(root, "16 key heads in one layer"), dtype="bfloat16")
    sizes = []
    for quantization in ("none", "int8"):
        model = PackedModel(policy, quantization=quantization)
        model.take(policy)
        own = {n: t.nbytes for n, t in model._tensors.items() if n[0].isdigit() and "norm" not in n}
        sizes.append(sum(own.values()))
    assert 0.5 <= sizes[1] / sizes[0] <= 0.53


def test_weights_that_are_not_finite_are_an_error(root: Path, kernels: ctypes.CDLL):
    settings = ModelSettings(name_or_path=str(folder_of(root, "qwen3")), dtype="float32", device="cpu")
    policy = load_policy(settings)
    with torch.no_grad():
        policy.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        engine_of(policy, kernels).generate(
            problems_of([5]), n=1, sampling=SamplingSettings(max_new_tokens=2), seed=0
        )
