"""Linears in bfloat16 by the kernels of grouped.py, as one group.

torch hands such products to oneDNN, which makes a program for each new number of tokens: half a millisecond and 0.7 MB
for each of a layer's dozen products. The kernels have none, and add the weight's gradient straight to `main_grad`.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitae.models import grouped, native
from kitae.models.grouped import Groups, Rows

MIN_ROWS = 64
"""With fewer, packing the weights costs more than their product."""
PANEL = 64
"""Columns that a thread takes at a time: PANEL_ROWS in kernels/cells.h."""


def fuse_linears(decoder: nn.Module) -> None:
    """Let the plain linears of the layers compute with kernels where these fit."""
    for module in decoder.modules():
        if type(module) is nn.Linear:
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(self: Any, x: Tensor) -> Tensor:
    if self.bias is not None or not _fits(x, self.weight):
        return F.linear(x, self.weight, self.bias)
    y: Tensor = _Linear.apply(x, self.weight)  # type: ignore[no-untyped-call]
    return y


def _fits(x: Tensor, weight_OI: Tensor) -> bool:
    return (
        x.dtype == torch.bfloat16
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and x.is_contiguous()
        and weight_OI.is_contiguous()
        and native.fits(x, weight_OI)
        and min(weight_OI.shape) >= PANEL * torch.get_num_threads()
        and _suits(*weight_OI.shape)
    )


@functools.cache
def _suits(outputs: int, inputs: int) -> bool:
    """Whether the kernels are there for bfloat16 weights of this shape."""
    return grouped.fits(torch.empty(1, outputs, inputs, dtype=torch.bfloat16))


class _Linear(torch.autograd.Function):
    """x W^T; a weight with a float32 `main_grad` gets its gradient added there, and none in `.grad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.main_grad = getattr(weight_OI, "main_grad", None)
        y_TO = grouped.product(
            Rows(_matrix(x)), weight_OI.detach()[None], _one_group(x.numel() // x.shape[-1])
        )
        return y_TO.view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_TO, group = Rows(_matrix(grad.contiguous())), _one_group(x.numel() // x.shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped.back_product(grad_TO, weight_OI.detach()[None], group).view(x.shape)
        if ctx.needs_input_grad[1]:
            main_grad = None if ctx.main_grad is None else ctx.main_grad[None]
            total_1OI = grouped.weight_gradient(grad_TO, Rows(_matrix(x)), group, add_to=main_grad)
            grad_weight = total_1OI[0] if main_grad is None else None
        return grad_x, grad_weight


def _matrix(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


@functools.lru_cache(maxsize=64)
def _one_group(rows: int) -> Groups:
    return Groups(sizes_E=torch.tensor([rows]), sizes=[rows], kernels=True)
