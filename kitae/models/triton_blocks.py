"""What a decoder layer does beside its matrix products, in Triton: on a GPU what native.py is on a CPU.

    heads --norm of each, where there is one--> rotated     one kernel instead of ten
    gate, up --> silu(gate) up                              one instead of two, and nothing kept between them

Each is the float32 result of its torch formula, rounded once. `why_not` tries a device, values and gradients, before the
first pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

LARGEST_HEAD = 1024
ROWS = 8
"""Heads of one program."""
BLOCK = 1024
"""Numbers of one program."""
PROGRAMS = 256
"""Programs that share the sums of a norm's gradient."""


def fits(*tensors: Tensor | None) -> bool:
    """Whether kernels are there for tensors such as these: whole ones on a GPU, of one dtype."""
    given = [x for x in tensors if x is not None]
    return all(
        x.device.type != "cpu" and x.dtype == given[0].dtype and type(x) in (Tensor, torch.nn.Parameter)
        for x in given
    )


def rotary(x_THD: Tensor, norm_D: Tensor | None, cos_TD: Tensor, sin_TD: Tensor, epsilon: float) -> Tensor:
    """Heads, each normalised (arXiv:1910.07467) where there is a weight, rotated by halves (arXiv:2104.09864)."""
    with torch.accelerator.device_index(x_THD.device.index):  # Triton launches on the present device
        y: Tensor = _Rotary.apply(x_THD, norm_D, cos_TD, sin_TD, epsilon)  # type: ignore[no-untyped-call]
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, arXiv:2002.05202."""
    with torch.accelerator.device_index(gate.device.index):
        y: Tensor = _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        tokens, heads, size = x.shape
        y = torch.empty_like(x)
        half = triton.next_power_of_2(size // 2)
        _rotate[(triton.cdiv(tokens * heads, ROWS),)](
            x, norm, cos, sin, y, tokens * heads, heads, epsilon,
            SIZE=size, HALF=half, HAS_NORM=norm is not None, ROWS=ROWS,
        )  # fmt: skip
        ctx.save_for_backward(x if norm is not None else None, norm, cos, sin)
        ctx.shape, ctx.epsilon = x.shape, epsilon
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, cos, sin = ctx.saved_tensors
        tokens, heads, size = ctx.shape
        dy = dy.contiguous()
        dx = torch.empty_like(dy)
        wants_norm = ctx.needs_input_grad[1]
        programs = max(1, min(PROGRAMS, triton.cdiv(tokens * heads, ROWS)))
        sums = torch.empty(programs, size, device=dy.device, dtype=torch.float32) if wants_norm else None
        _rotate_backward[(programs,)](
            x, norm, cos, sin, dy, dx, sums, tokens * heads, heads, ctx.epsilon,
            SIZE=size, HALF=triton.next_power_of_2(size // 2), HAS_NORM=norm is not None, WANTS_NORM=wants_norm,
            ROWS=ROWS, PROGRAMS=programs,
        )  # fmt: skip
        return dx, None if sums is None else sums.sum(0).to(norm.dtype), None, None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        _gate[(triton.cdiv(y.numel(), BLOCK),)](gate, up, y, y.numel(), BLOCK=BLOCK)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _gate_backward[(triton.cdiv(gate.numel(), BLOCK),)](
            gate, up, dy.contiguous(), dgate, dup, gate.numel(), BLOCK=BLOCK
        )
        return dgate, dup


@triton.jit
def _rotate(
    x_ptr, norm_ptr, cos_ptr, sin_ptr, y_ptr, count, heads, epsilon,
    SIZE: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, HALF)
    is_there = (row < count)[:, None] & (d < SIZE // 2)[None, :]
    left = row[:, None] * SIZE + d[None, :]
    right = left + SIZE // 2
    a = tl.load(x_ptr + left, mask=is_there, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + right, mask=is_there, other=0.0).to(tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / SIZE + epsilon)[:, None]
        a *= factor * tl.load(norm_ptr + d, mask=d < SIZE // 2, other=0.0).to(tl.float32)[None, :]
        b *= factor * tl.load(norm_ptr + SIZE // 2 + d, mask=d < SIZE // 2, other=0.0).to(tl.float32)[None, :]
    angle = (row // heads)[:, None] * SIZE + d[None, :]
    cos_a = tl.load(cos_ptr + angle, mask=is_there, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + angle, mask=is_there, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + angle + SIZE // 2, mask=is_there, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + angle + SIZE // 2, mask=is_there, other=0.0).to(tl.float32)
    tl.store(y_ptr + left, a * cos_a - b * sin_a, mask=is_there)
    tl.store(y_ptr + right, b * cos_b + a * sin_b, mask=is_there)


@triton.jit
def _rotate_backward(
    x_ptr, norm_ptr, cos_ptr, sin_ptr, dy_ptr, dx_ptr, sums_ptr, count, heads, epsilon,
    SIZE: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr, WANTS_NORM: tl.constexpr,
    ROWS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th block of heads; the norm's gradient is summed over them."""
    program = tl.program_id(0)
    d = tl.arange(0, HALF)
    is_size = d < SIZE // 2
    sum_a = tl.zeros([HALF], tl.float32)
    sum_b = tl.zeros([HALF], tl.float32)
    for block in range(program, tl.cdiv(count, ROWS), PROGRAMS):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        is_there = (row < count)[:, None] & is_size[None, :]
        left = row[:, None] * SIZE + d[None, :]
        right = left + SIZE // 2
        dy_a = tl.load(dy_ptr + left, mask=is_there, other=0.0).to(tl.float32)
        dy_b = tl.load(dy_ptr + right, mask=is_there, other=0.0).to(tl.float32)
        angle = (row // heads)[:, None] * SIZE + d[None, :]
        cos_a = tl.load(cos_ptr + angle, mask=is_there, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + angle, mask=is_there, other=0.0).to(tl.float32)
        cos_b = tl.load(cos_ptr + angle + SIZE // 2, mask=is_there, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + angle + SIZE // 2, mask=is_there, other=0.0).to(tl.float32)
        da = dy_a * cos_a + dy_b * sin_b
        db = dy_b * cos_b - dy_a * sin_a
        if HAS_NORM:
            a = tl.load(x_ptr + left, mask=is_there, other=0.0).to(tl.float32)
            b = tl.load(x_ptr + right, mask=is_there, other=0.0).to(tl.float32)
            factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / SIZE + epsilon)[:, None]
            a *= factor
            b *= factor
            sum_a += tl.sum(da * a, 0)
            sum_b += tl.sum(db * b, 0)
            da *= tl.load(norm_ptr + d, mask=is_size, other=0.0).to(tl.float32)[None, :]
            db *= tl.load(norm_ptr + SIZE // 2 + d, mask=is_size, other=0.0).to(tl.float32)[None, :]
            mean = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / SIZE)[:, None]
            da = factor * (da - a * mean)
            db = factor * (db - b * mean)
        tl.store(dx_ptr + left, da, mask=is_there)
        tl.store(dx_ptr + right, db, mask=is_there)
    if WANTS_NORM:
        tl.store(sums_ptr + program * SIZE + d, sum_a, mask=is_size)
        tl.store(sums_ptr + program * SIZE + SIZE // 2 + d, sum_b, mask=is_size)


@triton.jit
def _gate(gate_ptr, up_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, gate * tl.sigmoid(gate) * up, mask=at < count)


@triton.jit
def _gate_backward(gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(dup_ptr + at, dy * gate * share, mask=at < count)
    tl.store(dgate_ptr + at, dy * up * share * (1 + gate * (1 - share)), mask=at < count)


def why_not(*, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels do not serve on this device; None where they were tried and do."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    def gradients(y: Tensor, *inputs: Tensor) -> list[Tensor]:
        weight = torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
        return [y, *torch.autograd.grad((y.float() * weight).sum(), inputs)]

    x, norm, gate, up = drawn(37, 3, head_size), drawn(head_size), drawn(37, 100), drawn(37, 100)
    cos, sin = (drawn(37, head_size).detach() for _ in range(2))
    try:
        with torch.enable_grad():
            found = [
                *gradients(rotary(x, norm, cos, sin, 1e-6), x, norm),
                *gradients(rotary(x, None, cos, sin, 0.0), x),
                *gradients(swiglu(gate, up), gate, up),
            ]
    except Exception as error:  # compilers raise anything
        return f"they do not run here: {str(error).strip().splitlines()[0][:200]}"
    with torch.enable_grad():
        expected = [
            *gradients(plain_rotary(x, norm, cos, sin, 1e-6), x, norm),
            *gradients(plain_rotary(x, None, cos, sin, 0.0), x),
            *gradients(F.silu(gate.float()) * up.float(), gate, up),
        ]
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = ours.detach().float(), theirs.detach().float()
        off = float((ours - theirs).norm() / theirs.norm())
        if not off < (1e-4 if dtype == torch.float32 else 0.02):
            return f"they give other numbers here: {off:.1e} off"
    return None


def plain_rotary(
    x_THD: Tensor, norm_D: Tensor | None, cos_TD: Tensor, sin_TD: Tensor, epsilon: float
) -> Tensor:
    """What `rotary` computes, in torch and float32."""
    x = x_THD.float()
    if norm_D is not None:
        x = F.rms_norm(x, norm_D.shape, norm_D.float(), epsilon)
    a, b = x.chunk(2, -1)
    turned = torch.cat((-b, a), -1)
    return x * cos_TD.float()[:, None] + turned * sin_TD.float()[:, None]
