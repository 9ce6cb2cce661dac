"""Routed experts as slices of one sorted tensor: one stable sort by expert, one matrix product per expert used.

    hidden_TH --a copy per expert--> x_SH --gate_up--> h_SG --gate--> a_SI --down--> y_SH --weighted sum--> [T, H]

S slots: tokens x experts per token, sorted by expert, each expert's rows padded so that the shapes of products repeat;
G is 2 I, E experts, k experts per token, R rank of an adapter. One autograd function: only h is kept for the backward,
frozen experts compute no weight gradient, and adapters (W + scale B A per expert) are multiplied as two thin products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROUND_TO = 16
"""An expert's rows above this are rounded up to a multiple: oneDNN takes over a millisecond to prepare a new shape."""


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
    named = [(adapters or {}).get(name, []) for name in ("gate_up_proj", "down_proj")]
    task = _Task(
        slots=_sort(top_k_index, module.num_experts),
        gate=module._apply_gate,
        scales=[[adapter.scale for adapter in own] for own in named],
    )
    low = [tensor for own in named for adapter in own for tensor in (adapter.a_ERI, adapter.b_EOR)]
    out: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        hidden_TH, top_k_weights, module.gate_up_proj, module.down_proj, task, *low
    )
    return out


@dataclass(frozen=True, slots=True)
class _Slots:
    """How many slots each expert has, and which token lies in each; padding slots hold token 0 with weight 0."""

    sizes: list[int]
    """Of each expert, 0 where it has none."""
    slot_Tk: Tensor
    token_S: Tensor

    def by_expert(
        self, in_slots: Sequence[Tensor], of_experts: Sequence[Tensor]
    ) -> Iterator[Sequence[Tensor]]:
        """For each expert with slots, its rows of the tensors [S, ...], then its part of those [E, ...]."""
        parts = [x.split(self.sizes) for x in in_slots] + [x.unbind() for x in of_experts]
        return (own for size, own in zip(self.sizes, zip(*parts, strict=True), strict=True) if size)

    def weights(self, top_k_weights: Tensor) -> Tensor:
        weight_S = top_k_weights.new_zeros(len(self.token_S))
        weight_S[self.slot_Tk] = top_k_weights
        return weight_S


def _sort(top_k_index: Tensor, num_experts: int) -> _Slots:
    k = top_k_index.shape[1]
    expert_M, order_M = top_k_index.flatten().sort(stable=True)
    counts = torch.bincount(expert_M, minlength=num_experts)
    padded = torch.where(counts > ROUND_TO, (counts + ROUND_TO - 1) // ROUND_TO * ROUND_TO, counts)
    padding_before_E = (padded - counts).cumsum(0) - (padded - counts)
    slot_M = torch.arange(len(order_M), device=order_M.device) + padding_before_E[expert_M]
    slot_Tk = torch.empty_like(slot_M)
    slot_Tk[order_M] = slot_M
    sizes = padded.tolist()
    token_S = slot_M.new_zeros(sum(sizes))
    token_S[slot_M] = order_M // k
    return _Slots(sizes, slot_Tk.view_as(top_k_index), token_S)


@dataclass(frozen=True, slots=True)
class _Task:
    slots: _Slots
    gate: Callable[[Tensor], Tensor]
    scales: list[list[float]]
    """Of the adapters of gate_up_proj, and of down_proj."""


class _Experts(torch.autograd.Function):
    """A weight with a float32 `main_grad` gets its gradient added there, and none in `.grad`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_Tk: Tensor,
        gate_up_EGH: Tensor,
        down_EHI: Tensor,
        task: _Task,
        *low: Tensor,
    ) -> Tensor:
        slots = task.slots
        gate_up, down = _weights(gate_up_EGH, down_EHI, task, low)
        h_SG = gate_up.product(hidden_TH.index_select(0, slots.token_S), slots)
        y_SH = down.product(task.gate(h_SG), slots)
        ctx.save_for_backward(hidden_TH, weight_Tk, gate_up_EGH, down_EHI, h_SG, *low)
        ctx.task = task
        ctx.main_grads = [getattr(weight, "main_grad", None) for weight in (gate_up_EGH, down_EHI)]
        y_TkH = y_SH.index_select(0, slots.slot_Tk.flatten()).view(*weight_Tk.shape, -1)
        return (y_TkH * weight_Tk[..., None]).sum(1).to(hidden_TH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_Tk, gate_up_EGH, down_EHI, h_SG, *low = ctx.saved_tensors
        task, slots = ctx.task, ctx.task.slots
        needs_hidden, needs_weights, needs_gate_up, needs_down, _, *needs_low = ctx.needs_input_grad
        gate_up, down = _weights(gate_up_EGH, down_EHI, task, low)
        split = 2 * len(task.scales[0])
        with torch.enable_grad():  # the gate is any function of the model's
            h_SG = h_SG.detach().requires_grad_()
            a_SI = task.gate(h_SG)
        # y is not kept: its product with the gradient, which the router gets, equals that of a with a's gradient.
        grad_y_SH = grad_TH.index_select(0, slots.token_S)
        grad_a_SI = down.back_product(grad_y_SH, slots)
        grad_weight_Tk = None
        if needs_weights:
            dots_S = (grad_a_SI.float() * a_SI.detach()).sum(1)
            grad_weight_Tk = dots_S[slots.slot_Tk].to(weight_Tk.dtype)
        weight_S1 = slots.weights(weight_Tk)[:, None]
        grad_y_SH.mul_(weight_S1)
        grad_a_SI.mul_(weight_S1)
        grad_down, *grads_down = down.gradients(
            a_SI.detach(), grad_y_SH, slots, [needs_down, *needs_low[split:]], ctx.main_grads[1]
        )
        grad_hidden_TH = grad_gate_up = None
        grads_gate_up: list[Tensor | None] = [None] * split
        if needs_hidden or needs_gate_up or any(needs_low[:split]):
            (grad_h_SG,) = torch.autograd.grad(a_SI, h_SG, grad_a_SI)
            grad_gate_up, *grads_gate_up = gate_up.gradients(
                hidden_TH.index_select(0, slots.token_S),
                grad_h_SG,
                slots,
                [needs_gate_up, *needs_low[:split]],
                ctx.main_grads[0],
            )
            if needs_hidden:
                grad_x_SH = gate_up.back_product(grad_h_SG, slots)
                grad_x_TkH = grad_x_SH.index_select(0, slots.slot_Tk.flatten()).view(*weight_Tk.shape, -1)
                grad_hidden_TH = grad_x_TkH.sum(1)
        return grad_hidden_TH, grad_weight_Tk, grad_gate_up, grad_down, None, *grads_gate_up, *grads_down


@dataclass(frozen=True, slots=True)
class _Weight:
    """One weight per expert with its adapters; rows of the inputs are sorted by expert."""

    weight_EOI: Tensor
    adapters: list[ExpertAdapter]

    def product(self, x_SI: Tensor, slots: _Slots) -> Tensor:
        """x W^T + scale (x A^T) B^T."""
        y_SO = x_SI.new_empty(len(x_SI), self.weight_EOI.shape[1])
        for x, y, weight in slots.by_expert([x_SI, y_SO], [self.weight_EOI]):
            torch.mm(x, weight.t(), out=y)
        for a_ERI, b_EOR, scale in self.adapters:
            for x, y, a, b in slots.by_expert([x_SI, y_SO], [a_ERI, b_EOR]):
                y.addmm_(x @ a.t(), b.t(), alpha=scale)
        return y_SO

    def back_product(self, grad_SO: Tensor, slots: _Slots) -> Tensor:
        """The gradient of x: dY W + scale (dY B) A."""
        grad_SI = grad_SO.new_empty(len(grad_SO), self.weight_EOI.shape[2])
        for dy, dx, weight in slots.by_expert([grad_SO, grad_SI], [self.weight_EOI]):
            torch.mm(dy, weight, out=dx)
        for a_ERI, b_EOR, scale in self.adapters:
            for dy, dx, a, b in slots.by_expert([grad_SO, grad_SI], [a_ERI, b_EOR]):
                dx.addmm_(dy @ b, a, alpha=scale)
        return grad_SI

    def gradients(
        self,
        x_SI: Tensor,
        grad_SO: Tensor,
        slots: _Slots,
        needs: Sequence[bool],
        main_grad: Tensor | None,
    ) -> Iterator[Tensor | None]:
        """Of the weight (None where main_grad took it), then of each adapter's A and B; None where not needed."""
        grad_EOI = main_grad
        if needs[0]:
            if grad_EOI is None:
                grad_EOI = torch.zeros_like(self.weight_EOI)
            for dy, x, dweight in slots.by_expert([grad_SO, x_SI], [grad_EOI]):
                dweight.add_(dy.t() @ x)
        yield grad_EOI if needs[0] and main_grad is None else None
        for a_ERI, b_EOR, scale in self.adapters:
            grad_ERI, grad_EOR = torch.zeros_like(a_ERI), torch.zeros_like(b_EOR)
            for dy, x, a, b, da, db in slots.by_expert([grad_SO, x_SI], [a_ERI, b_EOR, grad_ERI, grad_EOR]):
                torch.mm((dy @ b).mul_(scale).t(), x, out=da)
                torch.mm(dy.t(), (x @ a.t()).mul_(scale), out=db)
            yield grad_ERI
            yield grad_EOR


def _weights(
    gate_up_EGH: Tensor, down_EHI: Tensor, task: _Task, low: Sequence[Tensor]
) -> tuple[_Weight, _Weight]:
    """Both weights with their adapters, whose matrices `low` holds in the order of task.scales."""
    pairs = iter(zip(low[::2], low[1::2], strict=True))
    gate_up, down = ([ExpertAdapter(*next(pairs), scale=scale) for scale in scales] for scales in task.scales)
    return _Weight(gate_up_EGH, gate_up), _Weight(down_EHI, down)
