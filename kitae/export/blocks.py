"""GGUF's blocks of few bits, made of float32 rows: q8_0, q5_1, q5_0, q4_0, and llama.cpp's K-quants q6_K, q5_K, q4_K.

A row is cut into blocks of 32 (K-quants: of 256); a block holds small integers and a float16 scale, and the K-quants
have integer scales for 8 or 16 parts of a block beneath it. The formats are those of ggml, and so are the searches for
scales: of many candidates, the one with the least weighted squared error. Where there is a compiler, native.py searches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kitae.export import native

SMALLEST = 1e-15
"""Parts whose largest magnitude is below are zero."""


def quantize(kind: str, x: Tensor) -> Tensor:
    """Rows of float32 as bytes, uint8 of [rows, bytes a row]; a row is a whole number of blocks."""
    size, num_bytes, make = KINDS[kind]
    rows, columns = x.shape
    assert columns % size == 0, (kind, columns)
    return make(x.reshape(-1, size)).reshape(rows, columns // size * num_bytes)


def _half(x: Tensor) -> Tensor:
    """Two bytes each of float16."""
    return x.to(torch.float16).unsqueeze(-1).view(torch.uint8)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / x)


def _over(number: float, x: Tensor) -> Tensor:
    """number / x, rounded once: torch multiplies by 1 / x, which may put the largest value on the other side of a half."""
    return torch.full_like(x, number).div_(x)


def _signed_largest(x: Tensor) -> Tensor:
    """Of each row of the last dimension the value of largest magnitude, with its sign."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)


def _q8_0(x_BK: Tensor) -> Tensor:
    scale_B = x_BK.abs().amax(1) / 127
    scaled = x_BK * _inverse(scale_B)[:, None]
    whole = torch.copysign((scaled.abs() + 0.5).floor(), scaled)  # halves away from zero
    return torch.cat((_half(scale_B), whole.to(torch.int8).view(torch.uint8)), 1)


def _q4_0(x_BK: Tensor) -> Tensor:
    scale_B = _signed_largest(x_BK) / -8
    q = (x_BK * _inverse(scale_B)[:, None] + 8.5).to(torch.uint8).clamp_(max=15)
    return torch.cat((_half(scale_B), q[:, :16] | q[:, 16:] << 4), 1)


def _q5_0(x_BK: Tensor) -> Tensor:
    scale_B = _signed_largest(x_BK) / -16
    q = (x_BK * _inverse(scale_B)[:, None] + 16.5).to(torch.uint8).clamp_(max=31)
    return torch.cat((_half(scale_B), _five_bits(q)), 1)


def _q5_1(x_BK: Tensor) -> Tensor:
    low_B, high_B = x_BK.amin(1), x_BK.amax(1)
    scale_B = (high_B - low_B) / 31
    q = ((x_BK - low_B[:, None]) * _inverse(scale_B)[:, None] + 0.5).to(torch.uint8)
    return torch.cat((_half(scale_B), _half(low_B), _five_bits(q)), 1)


def _five_bits(q_BK: Tensor) -> Tensor:
    """32 values of five bits in twenty bytes, the fifth bits first."""
    places = 1 << torch.arange(8, dtype=torch.uint8)
    fifth = ((q_BK >> 4).view(-1, 4, 8) * places).sum(2, dtype=torch.uint8)
    return torch.cat((fifth, q_BK[:, :16] & 15 | (q_BK[:, 16:] & 15) << 4), 1)


# K-quants ------------------------------------------------------------------------------------------------------


def _q6_K(x_BK: Tensor) -> Tensor:
    x_BPE = x_BK.view(-1, 16, 16)
    kernels = native.library()
    find = symmetric_scales if kernels is None else functools.partial(native.symmetric_scales, kernels)
    scale_BP = find(x_BPE)
    largest_B = _signed_largest(scale_BP)
    is_zero_B = largest_B.abs() < SMALLEST
    d_B = torch.where(is_zero_B, 0.0, largest_B / -128)
    steps_BP = (scale_BP * _inverse(d_B)[:, None]).round_().clamp_(-128, 127)
    unit_BP = d_B.half().float()[:, None] * steps_BP
    q = (x_BPE * _inverse(unit_BP)[..., None]).round_().clamp_(-32, 31).add_(32).to(torch.uint8)
    q_BHQE = q.view(-1, 2, 4, 32)  # two halves of four quarters
    first, second, third, fourth = q_BHQE.unbind(2)
    low = torch.stack((first & 15 | (third & 15) << 4, second & 15 | (fourth & 15) << 4), 2)
    high = first >> 4 | second >> 4 << 2 | third >> 4 << 4 | fourth >> 4 << 6
    scales = steps_BP.to(torch.int8).view(torch.uint8)
    return torch.cat((low.view(-1, 128), high.view(-1, 64), scales, _half(d_B)), 1)


def symmetric_scales(x_BPE: Tensor) -> Tensor:
    """Scales of parts whose values are -32 to 31 times them, errors weighted by x^2."""
    largest = _signed_largest(x_BPE)
    is_zero = largest.abs() < SMALLEST
    largest = torch.where(is_zero, 1.0, largest)
    weight = x_BPE * x_BPE
    best = scale = torch.zeros_like(largest)
    for step in (0, *range(-9, 0), *range(1, 10)):
        q = (x_BPE * _over(-(32 + 0.1 * step), largest)[..., None]).round_().clamp_(-32, 31)
        weighted = weight * q
        along, square = (weighted * x_BPE).sum(-1), (weighted * q).sum(-1)
        gain = torch.where(square > 0, along * along / square, 0.0)  # by how much the error falls
        is_better = gain > best
        best = torch.where(is_better, gain, best)
        scale = torch.where(is_better, along / square, scale)
    return scale.masked_fill_(is_zero, 0.0)


def _q4_K(x_BK: Tensor) -> Tensor:
    head, q_BGHE = _with_offsets(x_BK, levels=15, first=-1.0, steps=21)
    return torch.cat((head, (q_BGHE[:, :, 0] | q_BGHE[:, :, 1] << 4).view(-1, 128)), 1)


def _q5_K(x_BK: Tensor) -> Tensor:
    head, q_BGHE = _with_offsets(x_BK, levels=31, first=-0.5, steps=16)
    places = 1 << torch.arange(8, dtype=torch.uint8).view(4, 2, 1)
    fifth = ((q_BGHE >> 4) * places).sum((1, 2), dtype=torch.uint8)
    return torch.cat((head, fifth, (q_BGHE[:, :, 0] & 15 | q_BGHE[:, :, 1] << 4).view(-1, 128)), 1)


def _with_offsets(x_BK: Tensor, *, levels: int, first: float, steps: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets as bytes, and the values as four groups of two parts of 32."""
    x_BPE = x_BK.view(-1, 8, 32)
    kernels = native.library()
    find = scales_and_offsets if kernels is None else functools.partial(native.scales_and_offsets, kernels)
    scale_BP, offset_BP = find(x_BPE, levels=levels, first=first, steps=steps)
    d_B, dmin_B = scale_BP.amax(1) / 63, offset_BP.amax(1) / 63
    scale_steps = (scale_BP * _inverse(d_B)[:, None]).round_().clamp_(max=63)
    offset_steps = (offset_BP * _inverse(dmin_B)[:, None]).round_().clamp_(max=63)
    unit = d_B.half().float()[:, None] * scale_steps
    offset = dmin_B.half().float()[:, None] * offset_steps
    q = ((x_BPE + offset[..., None]) * _inverse(unit)[..., None]).round_().clamp_(0, levels).to(torch.uint8)
    head = torch.cat((_half(d_B), _half(dmin_B), _six_bits(scale_steps, offset_steps)), 1)
    return head, q.view(-1, 4, 2, 32)


def _six_bits(steps_BP: Tensor, offset_steps_BP: Tensor) -> Tensor:
    """Eight scales and eight offsets of six bits in twelve bytes: the last four of each give their upper bits away."""
    s, o = steps_BP.to(torch.uint8), offset_steps_BP.to(torch.uint8)
    upper_s, upper_o = s[:, 4:] >> 4 << 6, o[:, 4:] >> 4 << 6
    return torch.cat((s[:, :4] | upper_s, o[:, :4] | upper_o, s[:, 4:] & 15 | (o[:, 4:] & 15) << 4), 1)


def scales_and_offsets(x_BPE: Tensor, *, levels: int, first: float, steps: int) -> tuple[Tensor, Tensor]:
    """(scale, offset) of parts with x = scale * (0 to levels) - offset, errors weighted by |x| + the part's rms.

    Tried are `steps` ways to round: as if there were levels + first, + 0.1 more each time, of them.
    """
    weight = (x_BPE * x_BPE).mean(-1, keepdim=True).sqrt_() + x_BPE.abs()
    low, high = x_BPE.amin(-1).clamp_(max=0), x_BPE.amax(-1)
    is_flat = high <= low
    span = torch.where(is_flat, 1.0, high - low)
    weighted = weight * x_BPE
    sum_w, sum_x = weight.sum(-1), weighted.sum(-1)
    from_low = x_BPE - low[..., None]

    scale, offset = span / levels, low
    best = _error(x_BPE, weight, (from_low * _over(levels, span)[..., None]).round_(), scale, offset)
    for step in range(steps):
        q = (from_low * _over(levels + first + 0.1 * step, span)[..., None]).round_().clamp_(0, levels)
        wq = weight * q
        sum_q, sum_qq, sum_xq = wq.sum(-1), (wq * q).sum(-1), (wq * x_BPE).sum(-1)
        determinant = sum_w * sum_qq - sum_q * sum_q
        new_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant
        new_offset = (sum_qq * sum_x - sum_q * sum_xq) / determinant
        is_above = new_offset > 0
        new_offset = torch.where(is_above, 0.0, new_offset)
        new_scale = torch.where(is_above, sum_xq / sum_qq, new_scale)
        error = _error(x_BPE, weight, q, new_scale, new_offset)
        is_better = (error < best) & (determinant > 0)
        best = torch.where(is_better, error, best)
        scale = torch.where(is_better, new_scale, scale)
        offset = torch.where(is_better, new_offset, offset)
    return scale.masked_fill_(is_flat, 0.0), -offset


def _error(x: Tensor, weight: Tensor, q: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Weighted squared error of scale * q + offset."""
    difference = torch.addcmul(offset[..., None], q, scale[..., None]).sub_(x)
    return difference.mul_(difference).mul_(weight).sum(-1)


KINDS: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "Q8_0": (32, 34, _q8_0),
    "Q5_1": (32, 24, _q5_1),
    "Q5_0": (32, 22, _q5_0),
    "Q4_0": (32, 18, _q4_0),
    "Q6_K": (256, 210, _q6_K),
    "Q5_K": (256, 176, _q5_K),
    "Q4_K": (256, 144, _q4_K),
}
"""(values a block, bytes a block, how to make them)."""
