"""Triton's kernels in its interpreter, on a CPU; tests/gpu runs them compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = """
import torch
from kitae.models import triton_blocks

cpu = torch.device("cpu")
for size in (16, 80):
    assert (why := triton_blocks.why_not(head_size=size, dtype=torch.float32, device=cpu)) is None, why
plain = triton_blocks.plain_rotary
triton_blocks.plain_rotary = lambda x, norm, cos, sin, e: plain(x, norm, cos, -sin, e)
assert "give other numbers here" in triton_blocks.why_not(head_size=16, dtype=torch.float32, device=cpu)
"""
ATTENTION = """
import torch
from kitae.rollout.page_cache import attend_slowly
from kitae.rollout.triton_attention import attend

drawn = torch.Generator().manual_seed(0)
lengths, pages = [1, 16, 17, 64, 257], 40
for queries, heads, size, value_size in ((4, 2, 16, 16), (3, 1, 24, 16)):
    q = torch.randn(len(lengths), queries, size, generator=drawn)
    keys, values = (torch.randn(pages, 16, heads, n, generator=drawn) for n in (size, value_size))
    tables = torch.stack([torch.randperm(pages, generator=drawn)[:20] for _ in lengths]).int()
    given = (q, keys, values, tables, torch.tensor(lengths) - 1, size**-0.5)
    torch.testing.assert_close(attend(*given), attend_slowly(*given), rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize("code", [BLOCKS, ATTENTION], ids=["blocks", "attention"])
def test_kernels_give_what_plain_torch_gives(code: str):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
