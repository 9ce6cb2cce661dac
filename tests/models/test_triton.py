"""Triton's kernels in its interpreter, on a CPU; tests/gpu runs them compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# TODO(triton>3.6): its interpreter makes numbers of arrays of one, which numpy 2.4 refuses.
INTERPRETER = """
from triton.runtime import interpreter

own_patches = interpreter._patch_lang_tensor

def patch(tensor, scope):
    own_patches(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

interpreter._patch_lang_tensor = patch
"""
BLOCKS = """
import torch
from kitae.models import triton_blocks

cpu = torch.device("cpu")
for size in (16, 80):
    assert (why := triton_blocks.why_not(head_size=size, dtype=torch.float32, device=cpu)) is None, why
plain = triton_blocks.plain_rotary
x = torch.randn(3, 5, 48)[..., ::2].requires_grad_()  # with gaps in memory
norm, (cos, sin) = torch.randn(24, requires_grad=True), torch.randn(2, 3, 24)
for count in (3, 0):

    def outcome(way):
        y = way(x[:count], norm, cos[:count], sin[:count], 1e-6)
        return [y, *torch.autograd.grad((y * torch.arange(24)).sum(), (x, norm))]

    torch.testing.assert_close(outcome(triton_blocks.rotary), outcome(plain), rtol=1e-5, atol=1e-5)
triton_blocks.plain_rotary = lambda x, norm, cos, sin, e: plain(x, norm, cos, -sin, e)
assert "give other numbers here" in triton_blocks.why_not(head_size=16, dtype=torch.float32, device=cpu)
"""
ATTENTION = """
import torch
from kitae.rollout.page_cache import attend_slowly
from kitae.rollout.triton_attention import attend

drawn = torch.Generator().manual_seed(0)
lengths, pages = [1, 16, 17, 64, 257], 40
# a product's least size, heads of no power of two, latent attention, more query heads than a product's least rows
shapes = ((4, 2, 16, 16), (3, 1, 24, 16), (2, 2, 192, 128), (20, 1, 8, 8))
for (queries, heads, size, value_size), dtype, width in zip(
    shapes, (torch.float32, torch.float32, torch.float32, torch.float16), (20, 1000, 20, 20)
):
    q = torch.randn(queries, len(lengths), size, generator=drawn).to(dtype).transpose(0, 1)
    keys, values = (torch.randn(pages, 16, heads, n, generator=drawn).to(dtype) for n in (size, value_size))
    tables = torch.zeros(len(lengths), width, dtype=torch.int32)  # a wide table makes its parts longer
    tables[:, :20] = torch.stack([torch.randperm(pages, generator=drawn)[:20] for _ in lengths])
    given = (q, keys, values, tables, torch.tensor(lengths) - 1, size**-0.5)
    within = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(attend(*given), attend_slowly(*given), rtol=within, atol=within)
"""


def test_kernels_give_what_plain_torch_gives():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    code = [sys.executable, "-W", "error::UserWarning", "-c", INTERPRETER + BLOCKS + ATTENTION]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
