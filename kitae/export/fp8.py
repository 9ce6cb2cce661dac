"""Block-scaled FP8 as DeepSeek-V3 releases it (arXiv:2412.19437, section 3.3), by rows of a weight.

weight = float8 x scale_inv of its 128 x 128 block; the way back, scale_inv = largest magnitude / 448 in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kitae.errors import ModelError

LARGEST = 448.0
"""Of float8 e4m3."""
BLOCK = (128, 128)
NOT_CONVERTED = ("eh_proj.weight", "weights_proj.weight")
"""Linears that the releases leave in BF16: of multi-token prediction, and of V3.2's indexer."""
ALSO_CONVERTED = ("kv_a_proj_with_mqa.weight", "indexer.wq_b.weight", "indexer.wk.weight")


class Grid(NamedTuple):
    """Blocks over a weight of rows x columns; those at the edges may be smaller."""

    rows: int
    columns: int
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return -(-self.rows // self.block[0]), -(-self.columns // self.block[1])


def is_converted(name: str, *, dims: int) -> bool:
    """Whether a weight of that name is in FP8 in DeepSeek's releases: linears of layers, but router, head, embeddings.

    Example: model.layers.3.mlp.experts.7.up_proj.weight is, model.layers.3.mlp.gate.weight is not.
    """
    if dims != 2 or ".layers." not in f".{name}" or name.endswith(NOT_CONVERTED):
        return False
    return name.endswith(("_proj.weight", *ALSO_CONVERTED))


def dequantize_rows(weight: Tensor, scale: Tensor, *, start: int, grid: Grid, name: str) -> Tensor:
    """Rows of an FP8 weight in float32; `weight` begins at row `start`, a multiple of the block, `scale` is whole."""
    height, width = grid.block
    assert start % height == 0, (start, grid)
    x = widen(weight)
    if len(x) and x.abs().max() > LARGEST:
        raise ModelError(f"{name} has values that are NaN or infinite; the weights are damaged")
    scale_rows = scale[start // height : -(-(start + len(x)) // height)]
    per_column = scale_rows.repeat_interleave(width, 1)[:, : grid.columns]
    full = len(x) // height
    x[: full * height].view(full, height, grid.columns).mul_(per_column[:full, None])
    if full < len(scale_rows):
        x[full * height :].mul_(per_column[full])
    return require_finite(x, name=name)


def widen(weight: Tensor) -> Tensor:
    """float8 e4m3 in float32, exactly and several times faster than torch's cast; NaN becomes 480 with its sign.

    Shifted to where float16 has them, the exponent's bits count from -15 instead of -7, which a factor 2^8 makes good,
    for subnormal numbers too.
    """
    bits = weight.view(torch.int8).to(torch.int16)  # the sign fills the upper byte
    half = (bits << 7) & -0x4080  # sign, no bit 14, four of exponent and three after the point
    return half.view(torch.float16).float().mul_(256)


def quantize_rows(x: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """FP8 and scales of rows in float32 that begin at a block's first row.

    A block of zeros has scale 1. `power_of_two` rounds scales up to one (UE8M0), so that nothing overflows.
    """
    rows, columns = x.shape
    height, width = BLOCK
    down, right = -rows % height, -columns % width
    padded = F.pad(x, (0, right, 0, down)) if down or right else x
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    # By a tensor: a GPU divides by a number as it multiplies by its inverse, which rounds otherwise.
    scale = blocks.abs().amax((1, 3)) / blocks.new_full((1,), LARGEST)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa x 2^exponent, mantissa in [0.5, 1)
        exponent = exponent - (mantissa == 0.5).int()
        scale = torch.where(scale == 0, scale, torch.ldexp(torch.ones_like(scale), exponent))
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    # Rounding may leave the largest a hair above 448, and a scale below float32's normal numbers much more.
    small = (blocks / scale[:, None, :, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return small.view(padded.shape)[:rows, :columns].contiguous(), scale


def require_finite(x: Tensor, *, name: str) -> Tensor:
    """The same tensor; NaN and infinities are refused by the tensor's name."""
    # One sum finds them; it may overflow without them too, so only then is every element looked at.
    if not math.isfinite(x.sum().item()) and not x.isfinite().all():
        raise ModelError(f"{name} has values that are NaN or infinite; the weights are damaged")
    return x
