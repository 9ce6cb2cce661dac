"""Adapted linears, y = x W^T + s (x A^T) B^T (arXiv:2106.09685, eq. 3): one autograd function that uses that W is frozen.

    forward   x --W--> y;   x --A--> t;   s t B^T is added into y in place
    backward  dB = s dY^T t,   dA = s (dY B)^T x,   dX = dY W + s (dY B) A;   nothing for W, no dX where x needs none

Linears that read the same input (queries, keys and values; gate and up) are one such function: one product with all
their A, and in the backward one with all their W, which lie behind each other in memory.
Dimension key: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Linears of one module that are called with the same tensor; where they are not, each computes for itself."""


class SharedInput:
    """Adapted linears that read the same input: the first one called computes for all, the others pick theirs up."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)  # peft's layers, whose attributes are dynamic
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def output_of(self, layer: Any, x: Tensor) -> Tensor:
        """What `layer` gives for x; every layer must have a plain adapter."""
        if self._input is not x or id(layer) not in self._waiting:
            # Nothing is kept before it: where torch recomputes a layer, it ends here by an exception.
            outputs = adapted_linears(self.layers, x)
            self._input = x
            self._waiting = {id(own): y for own, y in zip(self.layers, outputs, strict=True)}
        y = self._waiting.pop(id(layer))
        if not self._waiting:
            self._input = None  # so that nothing is kept alive
        return y


def install(causal_lm: nn.Module) -> None:
    """Let every adapted linear of the model compute here; call it again after adapters were added."""
    from peft.tuners.lora.layer import LoraLayer

    groups: dict[tuple[str, tuple[str, ...], int], list[Any]] = defaultdict(list)
    for name, module in causal_lm.named_modules():
        if not isinstance(module, LoraLayer) or not isinstance(module.get_base_layer(), nn.Linear):
            continue
        layer: Any = module
        if isinstance(layer.base_layer, LoraLayer):  # two adapters on one weight, one around the other
            continue
        parent, _, own = name.rpartition(".")
        together = next((names for names in SAME_INPUT if own in names), (own,))
        groups[parent, together, layer.get_base_layer().in_features].append(layer)
    for layers in groups.values():
        shared = SharedInput(layers)
        if len(layers) > 1:
            _lay_together([layer.base_layer for layer in layers])
        for layer in layers:
            layer.shared_input = shared
            layer.forward = types.MethodType(_forward, layer)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(self: Any, x: Tensor) -> Tensor:
    """peft's layer: with its group where all are plain, alone, or as peft computes it (dropout, biases that train)."""
    shared: SharedInput = self.shared_input
    if all(_plain_adapter(layer, x) for layer in shared.layers):
        return shared.output_of(self, x)
    if _plain_adapter(self, x):
        return adapted_linears([self], x)[0]
    y: Tensor
    if not hasattr(self, "parameter_name"):
        y = type(self).forward(self, x)
        return y
    # A weight that peft adapts as a parameter: without adding W and B A up, as peft would.
    y = self.base_layer(x)
    for name in active_adapters(self):
        y = y + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
    return y


def active_adapters(layer: Any) -> list[str]:
    """Adapters a peft layer applies now; merged ones are in the weight already."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _plain_adapter(layer: Any, x: Tensor) -> str | None:
    """The one adapter that a layer applies now, where the function below computes the layer; else None."""
    active = active_adapters(layer)
    if len(active) != 1:
        return None
    name = active[0]
    base, a, b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    drops = layer.training and name in layer.lora_dropout and getattr(layer.lora_dropout[name], "p", 0.0) > 0
    is_plain = (
        not drops
        and name not in getattr(layer, "lora_variant", {})  # such as DoRA
        and b.bias is None
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and x.dtype == a.weight.dtype
        and (base.weight.dtype == x.dtype or not _is_dense(base.weight))
    )
    return name if is_plain else None


def adapted_linears(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
    """The output of each layer for the same x [..., I]; each has one plain adapter on a frozen weight."""
    names = [_plain_adapter(layer, x) for layer in layers]
    scales = [layer.scaling[name] for layer, name in zip(layers, names, strict=True)]
    a = [layer.lora_A[name].weight for layer, name in zip(layers, names, strict=True)]
    b = [layer.lora_B[name].weight for layer, name in zip(layers, names, strict=True)]
    bases = [layer.base_layer for layer in layers]
    outputs: tuple[Tensor, ...] = _AdaptedLinears.apply(x, bases, scales, *a, *b)  # type: ignore[no-untyped-call]
    return outputs


class _AdaptedLinears(torch.autograd.Function):
    """An adapter with a float32 `main_grad` gets its gradient added there, and none in `.grad`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: list[Any], scales: list[float], *ab: Tensor
    ) -> tuple[Tensor, ...]:
        a, b = ab[: len(bases)], ab[len(bases) :]
        x_TI = x.reshape(-1, x.shape[-1])
        ys_TO = [base(x_TI) for base in bases]
        t_TR = F.linear(x_TI, a[0] if len(a) == 1 else torch.cat(a))
        ts_TR = t_TR.split([len(own) for own in a], 1)
        _scale_(t_TR, ts_TR, scales)
        for y_TO, t, b_OR in zip(ys_TO, ts_TR, b, strict=True):
            y_TO.addmm_(t, b_OR.t())
        dense = [base.weight for base in bases if _is_dense(base.weight)]
        ctx.save_for_backward(x, t_TR, *ab, *dense)
        ctx.bases, ctx.scales = bases, scales
        ctx.main_grads = [getattr(parameter, "main_grad", None) for parameter in ab]
        return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[1]) for y_TO in ys_TO)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.bases)
        x, t_TR, *rest = ctx.saved_tensors
        a, b, dense = rest[:n], rest[n : 2 * n], rest[2 * n :]
        x_TI = x.reshape(-1, x.shape[-1])
        grads_TO = [grad.reshape(len(x_TI), -1) for grad in grads]
        ranks = [len(own) for own in a]
        u_TR = torch.empty_like(t_TR)
        us_TR = u_TR.split(ranks, 1)
        for grad_TO, b_OR, u in zip(grads_TO, b, us_TR, strict=True):
            torch.mm(grad_TO, b_OR, out=u)
        _scale_(u_TR, us_TR, ctx.scales)
        grad_a = torch.mm(u_TR.t(), x_TI).split(ranks)
        grad_b = [grad_TO.t() @ t for grad_TO, t in zip(grads_TO, t_TR.split(ranks, 1), strict=True)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _through_frozen(ctx.bases, dense, grads_TO)
            grad_x = grad_x.addmm_(u_TR, a[0] if n == 1 else torch.cat(a)).view(x.shape)
        left: list[Tensor | None] = []
        for grad, main_grad in zip([*grad_a, *grad_b], ctx.main_grads, strict=True):
            left.append(grad if main_grad is None else None)
            if main_grad is not None:
                main_grad.add_(grad)
        return grad_x, None, None, *left


def _scale_(whole_TR: Tensor, parts_TR: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Multiply the parts by their scales, in place; at once where those are the same."""
    if len(set(scales)) == 1:
        whole_TR.mul_(scales[0])
        return
    for part, scale in zip(parts_TR, scales, strict=True):
        part.mul_(scale)


def _through_frozen(bases: Sequence[Any], dense: Sequence[Tensor], grads_TO: Sequence[Tensor]) -> Tensor:
    """Sum over the bases of dY W: the gradient of their common input."""
    joined = _joined(dense) if len(dense) == len(bases) else None
    if joined is not None:
        return torch.mm(torch.cat(list(grads_TO), 1), joined)
    weights = iter(dense)
    grad_TI: Tensor | None = None
    for base, grad_TO in zip(bases, grads_TO, strict=True):
        weight = next(weights) if _is_dense(base.weight) else _in_full(base.weight, grad_TO.dtype)
        grad_TI = torch.mm(grad_TO, weight) if grad_TI is None else grad_TI.addmm_(grad_TO, weight)
    assert grad_TI is not None
    return grad_TI


def _is_dense(weight: Tensor) -> bool:
    """A matrix of numbers, and not bytes of 4-bit ones."""
    return weight.is_floating_point()


def _in_full(weight: Any, dtype: torch.dtype) -> Tensor:
    """A bitsandbytes 4-bit weight as a matrix [O, I]."""
    from bitsandbytes.functional import dequantize_4bit

    matrix: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return matrix.to(dtype)


def _joined(weights: Sequence[Tensor]) -> Tensor | None:
    """The weights as one matrix [sum of O, I] without copying; None where they do not lie behind each other."""
    first = weights[0]
    if len(weights) == 1 or not all(_is_dense(w) and w.is_contiguous() for w in weights):
        return None
    storage = first.untyped_storage().data_ptr()
    for before, after in pairwise(weights):
        ends = before.storage_offset() + before.numel()
        if after.untyped_storage().data_ptr() != storage or after.storage_offset() != ends:
            return None
    return first.detach().as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))


def _lay_together(linears: Sequence[Any]) -> None:
    """Move frozen weights of one input size and precision into one matrix, of which each keeps its rows."""
    weights = [linear.weight for linear in linears]
    kinds = {(w.dtype, w.device, w.shape[-1]) for w in weights}
    if len(kinds) > 1 or not all(_is_dense(w) and not w.requires_grad for w in weights):
        return
    if _joined(weights) is None:
        for weight, rows in zip(weights, torch.cat(weights).split([len(w) for w in weights]), strict=True):
            weight.data = rows.detach()
