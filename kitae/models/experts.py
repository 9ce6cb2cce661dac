"""Routed experts as slices of one sorted tensor: one stable sort by expert, then the products of grouped.py.

    hidden_TH --a row per slot--> x_SH --gate_up--> h_SG --gate--> a_SI --down--> y_SH --weighted sum--> [T, H]

S slots: tokens x experts per token, sorted by expert. The kernels read x from hidden; for torch's products it is copied,
each expert's rows padded so that their shapes repeat. G is 2 I, E experts, k experts per token, R rank of an adapter. One
autograd function: only h is kept for the backward, frozen experts compute no weight gradient, and adapters
(W + scale B A per expert) are multiplied as two thin products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kitae.models import grouped, native
from kitae.models.grouped import Groups, Rows

ROUND_TO = 16
"""For torch's products, rows above this are rounded up to a multiple: oneDNN takes over a millisecond to prepare a shape."""


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
    kernels: bool = False,
) -> Tensor:
    """transformers' experts interface; `adapters` by parameter name are added to that parameter's product.

    With `kernels`, those of native.py compute it where they can.
    """
    named = [(adapters or {}).get(name, []) for name in ("gate_up_proj", "down_proj")]
    low = [tensor for own in named for adapter in own for tensor in (adapter.a_ERI, adapter.b_EOR)]
    hidden_TH = hidden_TH.contiguous()
    kernels = kernels and _is_swiglu(module)
    kernels = kernels and grouped.fits(hidden_TH, module.gate_up_proj, module.down_proj, *low)
    task = _Task(
        slots=_sort(top_k_index, module.num_experts, kernels=kernels),
        gate=module._apply_gate,
        scales=[[adapter.scale for adapter in own] for own in named],
    )
    out: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        hidden_TH, top_k_weights, module.gate_up_proj, module.down_proj, task, *low
    )
    return out


def _is_swiglu(module: Any) -> bool:
    """Whether the gate is silu(gate) up, gate and up one after the other: the class has transformers' own `_apply_gate`."""
    gate = getattr(type(module), "_apply_gate", None)
    is_default = gate is not None and gate.__name__ == "_default_apply_gate"
    return is_default and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


@dataclass(frozen=True, slots=True)
class _Slots:
    """How many slots each expert has, and which token lies in each; padding slots hold token 0 with weight 0."""

    groups: Groups
    slot_Tk: Tensor
    token_S: Tensor

    def rows(self, x_TH: Tensor) -> Rows:
        """Each slot's row of its token."""
        if self.groups.kernels:
            return Rows(x_TH.contiguous(), self.token_S)
        return Rows(x_TH.index_select(0, self.token_S))

    def weights(self, weight_Tk: Tensor) -> Tensor:
        """Each slot's weight, in float32."""
        weight_S = torch.zeros(len(self.token_S), device=weight_Tk.device)
        weight_S[self.slot_Tk] = weight_Tk.float()
        return weight_S

    def sum(self, x_SH: Tensor, weight_Tk: Tensor | None = None) -> Tensor:
        """Of each token's slots, times their weights where there are some, [T, H]."""
        if self.groups.kernels:
            return native.sum_slots(x_SH, self.slot_Tk, None if weight_Tk is None else weight_Tk.float())
        x_TkH = x_SH.index_select(0, self.slot_Tk.flatten()).view(*self.slot_Tk.shape, -1)
        if weight_Tk is None:
            return x_TkH.sum(1)
        return (x_TkH * weight_Tk[..., None]).sum(1).to(x_SH.dtype)


def _sort(top_k_index: Tensor, num_experts: int, *, kernels: bool) -> _Slots:
    k = top_k_index.shape[1]
    expert_M, order_M = top_k_index.flatten().sort(stable=True)
    counts = padded = torch.bincount(expert_M, minlength=num_experts)
    if not kernels:
        padded = torch.where(counts > ROUND_TO, (counts + ROUND_TO - 1) // ROUND_TO * ROUND_TO, counts)
    padding_before_E = (padded - counts).cumsum(0) - (padded - counts)
    slot_M = torch.arange(len(order_M), device=order_M.device) + padding_before_E[expert_M]
    slot_Tk = torch.empty_like(slot_M)
    slot_Tk[order_M] = slot_M
    sizes = padded.tolist()
    token_S = slot_M.new_zeros(sum(sizes))
    token_S[slot_M] = order_M // k
    return _Slots(Groups(padded, sizes, kernels), slot_Tk.view_as(top_k_index), token_S)


@dataclass(frozen=True, slots=True)
class _Task:
    slots: _Slots
    gate: Callable[[Tensor], Tensor]
    scales: list[list[float]]
    """Of the adapters of gate_up_proj, and of down_proj."""

    def gated(self, h_SG: Tensor) -> Tensor:
        return native.gated(h_SG) if self.slots.groups.kernels else self.gate(h_SG)

    def gated_backward(
        self, h_SG: Tensor, grad_SI: Tensor, weight_S: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As native.gated_backward, for any gate."""
        if self.slots.groups.kernels:
            return native.gated_backward(h_SG, grad_SI, weight_S)
        with torch.enable_grad():
            h_SG = h_SG.detach().requires_grad_()
            a_SI = self.gate(h_SG)
        dots_S = (grad_SI.float() * a_SI.detach()).sum(1)
        (grad_h_SG,) = torch.autograd.grad(a_SI, h_SG, grad_SI.mul_(weight_S[:, None]))
        return grad_h_SG, a_SI.detach().mul_(weight_S[:, None]), dots_S


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
        h_SG = gate_up.product(slots.rows(hidden_TH), slots.groups)
        y_SH = down.product(Rows(task.gated(h_SG)), slots.groups)
        ctx.save_for_backward(hidden_TH, weight_Tk, gate_up_EGH, down_EHI, h_SG, *low)
        ctx.task = task
        ctx.main_grads = [getattr(weight, "main_grad", None) for weight in (gate_up_EGH, down_EHI)]
        return slots.sum(y_SH, weight_Tk)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_Tk, gate_up_EGH, down_EHI, h_SG, *low = ctx.saved_tensors
        task, slots, groups = ctx.task, ctx.task.slots, ctx.task.slots.groups
        needs_hidden, needs_weights, needs_gate_up, needs_down, _, *needs_low = ctx.needs_input_grad
        gate_up, down = _weights(gate_up_EGH, down_EHI, task, low)
        split = 2 * len(task.scales[0])
        # A slot adds weight (a W^T) to its token. y = a W^T is not kept: its product with the gradient, which the router
        # gets, equals that of a with a's gradient; and the weight may as well be a's where W's gradient is computed.
        grad_y = slots.rows(grad_TH)
        grad_h_SG, weighted_a_SI, dots_S = task.gated_backward(
            h_SG, down.back_product(grad_y, groups), slots.weights(weight_Tk)
        )
        grad_weight_Tk = dots_S[slots.slot_Tk].to(weight_Tk.dtype) if needs_weights else None
        needs = [needs_down, *needs_low[split:]]
        grads_down = down.gradients(Rows(weighted_a_SI), grad_y, groups, needs, ctx.main_grads[1])
        grad_hidden_TH = None
        needs = [needs_gate_up, *needs_low[:split]]
        grads_gate_up = gate_up.gradients(
            slots.rows(hidden_TH), Rows(grad_h_SG), groups, needs, ctx.main_grads[0]
        )
        if needs_hidden:
            grad_hidden_TH = slots.sum(gate_up.back_product(Rows(grad_h_SG), groups))
        first = grad_hidden_TH, grad_weight_Tk, grads_gate_up[0], grads_down[0], None
        return *first, *grads_gate_up[1:], *grads_down[1:]


@dataclass(frozen=True, slots=True)
class _Weight:
    """One weight per expert with its adapters; rows of the inputs are sorted by expert."""

    weight_EOI: Tensor
    adapters: list[ExpertAdapter]

    def product(self, x: Rows, groups: Groups) -> Tensor:
        """x W^T + scale (x A^T) B^T."""
        y_SO = grouped.product(x, self.weight_EOI, groups)
        for a_ERI, b_EOR, scale in self.adapters:
            low_SR = grouped.product(x, a_ERI, groups).mul_(scale)
            grouped.product(Rows(low_SR), b_EOR, groups, add_to=y_SO)
        return y_SO

    def back_product(self, grad: Rows, groups: Groups) -> Tensor:
        """The gradient of x: dY W + scale (dY B) A."""
        grad_SI = grouped.back_product(grad, self.weight_EOI, groups)
        for a_ERI, b_EOR, scale in self.adapters:
            low_SR = grouped.back_product(grad, b_EOR, groups).mul_(scale)
            grouped.back_product(Rows(low_SR), a_ERI, groups, add_to=grad_SI)
        return grad_SI

    def gradients(
        self, x: Rows, grad: Rows, groups: Groups, needs: Sequence[bool], main_grad: Tensor | None
    ) -> list[Tensor | None]:
        """Of the weight (None where main_grad took it), then of each adapter's A and B; None where not needed."""
        grads: list[Tensor | None] = [None]
        if needs[0]:
            grad_EOI = grouped.weight_gradient(grad, x, groups, add_to=main_grad)
            grads = [grad_EOI if main_grad is None else None]
        for a_ERI, b_EOR, scale in self.adapters:
            low_SR = grouped.back_product(grad, b_EOR, groups).mul_(scale)
            grads.append(grouped.weight_gradient(Rows(low_SR), x, groups))
            low_SR = grouped.product(x, a_ERI, groups).mul_(scale)
            grads.append(grouped.weight_gradient(grad, Rows(low_SR), groups))
        return grads


def _weights(
    gate_up_EGH: Tensor, down_EHI: Tensor, task: _Task, low: Sequence[Tensor]
) -> tuple[_Weight, _Weight]:
    """Both weights with their adapters, whose matrices `low` holds in the order of task.scales."""
    pairs = iter(zip(low[::2], low[1::2], strict=True))
    gate_up, down = ([ExpertAdapter(*next(pairs), scale=scale) for scale in scales] for scales in task.scales)
    return _Weight(gate_up_EGH, gate_up), _Weight(down_EHI, down)
