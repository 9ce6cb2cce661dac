"""Linear weights as 8-bit integers, each output with a scale of its own (kernels/int8.h).

Dimension key: N outputs, K inputs of a linear layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

MOST = 127
"""Largest magnitude of an integer."""
ROWS = 1024
"""Outputs that are in float32 at the same time."""
MOST_INPUTS = (2**31 - 1) // (255 * MOST)
"""The sum of so many products fits into 32 bits."""
SMALLEST = 1e-30
"""Scales are of a magnitude of at least this: what is smaller, such as a column of zeros, becomes zeros."""


def quantise(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [N, K] and scales [N] in float32, whose product is nearest to the weights. A weight that is not finite makes
    its scale so.
    """
    largest_N = weight_NK.abs().amax(1).float().clamp(min=SMALLEST)
    integers_NK = torch.empty(weight_NK.shape, dtype=torch.int8)
    for first in range(0, len(weight_NK), ROWS):
        rows = slice(first, first + ROWS)
        integers_NK[rows] = (weight_NK[rows].float() * (MOST / largest_N[rows])[:, None]).round_()
    return integers_NK, largest_N / MOST


def is_fast_here() -> bool:
    """Whether this CPU has the instruction for products of 8-bit integers that the kernels use."""
    try:
        return " avx512_vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
