"""Put rows of a tensor elsewhere, with a gradient that is a gather too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def move(x: Tensor, index: Tensor, *, back: Tensor, unused: Tensor | None = None) -> Tensor:
    """Select rows of x by `index`; its gradient is selected by `back`, which must be the way back.

    That is faster and more exact than scattering, and right because each real row has one place. `unused` are the
    rows of x nothing real was taken from; their gradient is zero.
    """
    moved: Tensor = _Move.apply(x, index, back, unused)  # type: ignore[no-untyped-call]
    return moved


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, unused: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, unused)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back, unused = ctx.saved_tensors
        out = grad.index_select(0, back)
        if unused is not None and len(unused):
            out.index_fill_(0, unused, 0.0)
        return out, None, None, None
