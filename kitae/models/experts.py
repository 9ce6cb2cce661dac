"""Routed experts as slices of one sorted tensor: one stable sort by expert, one matrix product per expert used.

    hidden_TH --sort by expert--> [M, H] --gate_up, gate, down--> [M, H] --back, weighted sum--> [T, H]

M is tokens x experts per token, E experts, R rank of an adapter. Frozen experts compute no weight gradient, and
adapters (W + scale B A per expert) are multiplied as two thin products, never as a sum of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kitae.models.moves import move


class ExpertAdapter(NamedTuple):
    """A low-rank change of every expert's weight."""

    a_ERI: Tensor
    b_EOR: Tensor
    scale: float


def is_plain(module: nn.Module) -> bool:
    """Whether a module holds experts as this file computes them: gated, without bias, [E, out, in] weights."""
    layout = {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": False,
        "is_concatenated": True,
        "has_post_expert_norm": False,
    }
    return all(getattr(module, name, None) is value for name, value in layout.items())


def experts_forward(
    module: Any,  # transformers' experts modules share attributes, not a class
    hidden_TH: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    adapters: Mapping[str, list[ExpertAdapter]] | None = None,
) -> Tensor:
    """transformers' experts interface; `adapters` by parameter name are added to that parameter's product."""
    num_tokens, k = top_k_index.shape
    adapters = adapters or {}
    expert_M, order_M = top_k_index.flatten().sort(stable=True)
    back_M = order_M.argsort()
    counts = torch.bincount(expert_M, minlength=module.num_experts).tolist()

    repeated = hidden_TH[:, None].expand(-1, k, -1).reshape(num_tokens * k, -1)
    x_MH = move(repeated, order_M, back=back_M)
    gated = module._apply_gate(_linear(module, "gate_up_proj", x_MH, counts, adapters))
    y_MH = _linear(module, "down_proj", gated, counts, adapters)
    y_TkH = move(y_MH, back_M, back=order_M).view(num_tokens, k, -1)
    return (y_TkH * top_k_weights[..., None]).sum(1).to(hidden_TH.dtype)


def _linear(
    module: Any, name: str, x: Tensor, counts: list[int], adapters: Mapping[str, list[ExpertAdapter]]
) -> Tensor:
    y = _grouped_linear(x, getattr(module, name), counts)
    for adapter in adapters.get(name, ()):
        low = _grouped_linear(x, adapter.a_ERI, counts)
        y = y + _grouped_linear(low, adapter.b_EOR, counts) * adapter.scale
    return y


def _grouped_linear(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    y: Tensor = _GroupedLinear.apply(x, weight, counts)  # type: ignore[no-untyped-call]
    return y


class _GroupedLinear(torch.autograd.Function):
    """Rows sorted by expert, each expert's times its own [out, in] weight.

    A weight with a float32 `main_grad` gets its gradient added there, and none in `.grad`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        y = x.new_empty(len(x), weight.shape[1])
        for e, own in _slices(counts):
            torch.mm(x[own], weight[e].t(), out=y[own])
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.main_grad = counts, getattr(weight, "main_grad", None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        target = grad_weight = None
        if ctx.needs_input_grad[1]:
            target = ctx.main_grad
            if target is None:
                target = grad_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        for e, own in _slices(ctx.counts):
            if grad_x is not None:
                torch.mm(grad[own], weight[e], out=grad_x[own])
            if target is not None:
                target[e].add_(grad[own].t() @ x[own])
        return grad_x, grad_weight, None


def _slices(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and where they are."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count
