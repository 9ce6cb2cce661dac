"""The input embedding, whose gradient goes to the rows that were read: no [vocabulary, hidden] gradient is made of zeros."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fuse_embedding(model: Any) -> None:
    """Let a plain input embedding add its gradient straight to the `main_grad` of its weight, where there is one."""
    embedding = model.get_input_embeddings()
    is_plain = type(embedding) is nn.Embedding and embedding.max_norm is None
    if is_plain and not embedding.sparse and not embedding.scale_grad_by_freq:
        embedding.forward = types.MethodType(_forward, embedding)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(self: Any, ids: Tensor) -> Tensor:
    if getattr(self.weight, "main_grad", None) is None:
        return F.embedding(ids, self.weight, self.padding_idx)
    looked_up: Tensor = _LookUp.apply(self.weight, ids, self.padding_idx)  # type: ignore[no-untyped-call]
    return looked_up


class _LookUp(torch.autograd.Function):
    """F.embedding; the backward adds to float32 `main_grad`, one token after the other, and leaves none in `.grad`."""

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.main_grad, ctx.padding_idx = weight_VH.main_grad, padding_idx  # type: ignore[attr-defined]
        return F.embedding(ids, weight_VH)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ids_T, grad_TH = ids.flatten(), grad.flatten(0, -2).float()
        if ctx.padding_idx is not None:  # whose row has no gradient, as in torch
            grad_TH = grad_TH * (ids_T != ctx.padding_idx)[:, None]
        ctx.main_grad.index_add_(0, ids_T, grad_TH)
        return None, None, None
