"""Every kernel that needs memory, while each of its allocations fails once (failing_new.cpp): for test_memory.py.

fault_memory.py MODEL...: what the kernels say then is an error, and what they compute afterwards is right.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitae.config import ModelSettings, SamplingSettings
from kitae.errors import PlanError
from kitae.models import native
from kitae.models.load import load_policy
from kitae.rollout.build import load_kernels
from kitae.rollout.native import NativeEngine
from kitae.types import Problem

TOKENS, HEADS, SIZE, VOCABULARY = 70, 2, 40, 90


def range_of(library: ctypes.CDLL | None) -> tuple[int, int]:
    """Where a library lies in this process."""
    assert library is not None
    lines = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(library._name)
    ]
    return int(lines[0].split("-")[0], 16), int(lines[-1].split()[0].split("-")[1], 16)


def checked(
    name: str, call: Callable[[], list[Any]], *, library: ctypes.CDLL | None, error: type[Exception]
) -> None:
    """Call until nothing fails any more; what it then gives is what it gives when nothing can fail."""
    failing = ctypes.CDLL(None)
    failing.end_failing.restype = ctypes.c_int64
    failing.begin_failing(*map(ctypes.c_size_t, range_of(library)))
    result, num_errors = None, 0
    while result is None:
        try:
            result = call()
        except error as told:
            num_errors += "memory" in str(told)
    num_failed = failing.end_failing()
    assert 0 < num_errors <= num_failed, (name, num_errors, num_failed)
    for got, wanted in zip(result, call(), strict=True):
        assert torch.equal(got, wanted) if isinstance(got, Tensor) else got == wanted, name
    print(name, num_failed)


def gradients(function: Callable[..., Tensor], *inputs: Tensor, **others: Any) -> list[Tensor]:
    """What the function gives, and the gradients of its sum."""
    given = [x.clone().requires_grad_() for x in inputs]
    y = function(*given, **others)
    y.square().sum().backward()
    return [y.detach(), *(x.grad for x in given if x.grad is not None)]


def attention(dtype: torch.dtype) -> list[Tensor]:
    """A prompt and two continuations."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(TOKENS, heads, SIZE).to(dtype) for heads in (2 * HEADS, HEADS, HEADS))
    segments = torch.tensor([[0, 30, 0, 0], [30, 25, 0, 30], [55, 15, 0, 30]])
    groups = torch.tensor([0, 3])
    return gradients(
        native.attend, q, k, v, segments=segments, groups=groups, padding=(TOKENS, TOKENS), scaling=0.2
    )


def norm(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return gradients(
        lambda x, w: native.rms_norm(x, w, 1e-6), torch.randn(9, 75).to(dtype), torch.randn(75).to(dtype)
    )


def rotary(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    cos, sin = torch.randn(2, TOKENS, SIZE).to(dtype)
    x, weight = torch.randn(TOKENS, HEADS, SIZE).to(dtype), torch.randn(SIZE).to(dtype)
    return gradients(lambda x, w: native.rotary(x, w, cos, sin, 1e-6), x, weight)


def products(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = torch.tensor([5, 0, 8])
    x, w, dy = torch.randn(13, 20).to(dtype), torch.randn(3, 70, 20).to(dtype), torch.randn(13, 70).to(dtype)
    y, dx, dw = x.new_empty(13, 70), torch.empty_like(x), torch.zeros(w.shape)
    native.grouped_product(x, None, sizes, w, is_transposed=True, adds=False, out=y)
    native.grouped_product(dy, None, sizes, w, is_transposed=False, adds=False, out=dx)
    native.add_grouped_outer_(dw, dy, None, x, None, sizes)
    return [y, dx, dw]


def head(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    logits, targets = torch.randn(TOKENS, VOCABULARY).to(dtype), torch.arange(TOKENS)
    said = native.target_logprobs_(logits, targets, temperature=0.7, scales_N=torch.randn(TOKENS))
    return [logits, *said]


def rollouts(folder: str, quantization: Any) -> Callable[[], list[Any]]:
    policy = load_policy(ModelSettings(name_or_path=folder, dtype="float32", device="cpu"), trainable=False)
    problems = [Problem(prompt="", token_ids=list(range(3, 3 + n)), index=n) for n in (1, 20)]
    sampling = SamplingSettings(temperature=0.9, max_new_tokens=4, top_p=0.8, top_k=9)

    def sample() -> list[Any]:
        engine = NativeEngine(
            policy, kernels=load_kernels(), stop_ids=(), decode=str, max_rows=4, quantization=quantization
        )
        plain = engine.generate(
            problems, n=2, sampling=SamplingSettings(temperature=0.9, max_new_tokens=3), seed=1
        )
        truncated = engine.generate(problems, n=2, sampling=sampling, seed=1)
        return [(r.token_ids, r.logprobs) for group in plain + truncated for r in group]

    return sample


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for call in (attention, norm, rotary, products, head):
            checked(
                f"{call.__name__} in {dtype}",
                functools.partial(call, dtype),
                library=native.library(),
                error=MemoryError,
            )
    for folder in sys.argv[1:]:
        for quantization in ("none", "int8"):
            checked(
                f"{folder} {quantization}",
                rollouts(folder, quantization),
                library=load_kernels(),
                error=PlanError,
            )


if __name__ == "__main__":
    main()
