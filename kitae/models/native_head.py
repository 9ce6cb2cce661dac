"""heads.py's chunked log-probs where native.py has kernels: logits never become float32, and are read and written once.

hidden_NH, head --chunk--> logits --one pass--> logprobs_N, entropy_N, and in the logits' place their gradient
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kitae.models import native
from kitae.models.heads import padded

BUDGET_BYTES = 4 << 20
"""Bytes of logits alive at once, which stay in a CPU's cache while that holds MIN_ROWS of them."""
MIN_ROWS, ROUND_TO = 192, 32
SLICE_BYTES = 4 << 20
"""Of a chunk's gradient of the head, made and added at a time; it stays in the cache."""


def chunked_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    coefficients_N: Tensor | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, as heads.chunked_logprobs gives them; native.fits the first three.

    With `coefficients_N`, a weight's main_grad has its part of the gradient before the backward comes.
    """
    if not torch.is_grad_enabled():
        coefficients_N = None  # no backward comes, so main_grad must stay as it is
    if len(targets_N):
        native.check_ids(targets_N, len(weight_VH))
    rows = _rows_per_chunk(len(hidden_NH), len(weight_VH), weight_VH.element_size(), budget_bytes)
    task = _Task(targets_N, temperature, rows)
    outputs: tuple[Tensor, Tensor] = _Chunked.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias_V, task, coefficients_N
    )
    return outputs


class _Task(NamedTuple):
    targets_N: Tensor
    temperature: float
    rows: int


@dataclass(slots=True)
class _Gradients:
    """Where the gradients of one call are added up, the head's in float32 and slice by slice. None: not needed."""

    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    def add(self, start: int, stop: int, grad_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
        if self.hidden_NH is not None:
            self.hidden_NH[start:stop] = (grad_CV @ weight_VH)[: stop - start]
        if self.weight_VH is not None:
            step = max(SLICE_BYTES // (weight_VH.element_size() * weight_VH.shape[1]), 1)
            for low in range(0, len(weight_VH), step):
                part = slice(low, low + step)
                native.add_(self.weight_VH[part], grad_CV[:, part].t() @ hidden_CH)
        if self.bias_V is not None:
            self.bias_V.add_(grad_CV.sum(0, dtype=torch.float32))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        task: _Task,
        coefficients_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V)
        ctx.task, ctx.coefficients_N, ctx.added = task, coefficients_N, None
        ctx.main_grads = [getattr(p, "main_grad", None) for p in (weight_VH, bias_V)]
        ctx.set_materialize_grads(False)
        if coefficients_N is not None and any(ctx.needs_input_grad[:3]):
            ctx.added = _places(ctx, hidden_NH, weight_VH, bias_V)
        return _in_chunks(hidden_NH, weight_VH, bias_V, task, ctx.added, coefficients_N)

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden_NH, weight_VH, bias_V = ctx.saved_tensors
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros(len(hidden_NH))
        added: _Gradients | None = ctx.added
        as_foretold = added is not None and torch.equal(grad_logprobs_N, ctx.coefficients_N)
        if added is None or not as_foretold or grad_entropy_N is not None:
            if added is not None:  # take back what the forward added to main_grad
                _in_chunks(hidden_NH, weight_VH, bias_V, ctx.task, added, -ctx.coefficients_N)
            added = _places(ctx, hidden_NH, weight_VH, bias_V)
            _in_chunks(hidden_NH, weight_VH, bias_V, ctx.task, added, grad_logprobs_N, grad_entropy_N)
        left = [
            None if grad is None or main is not None else grad.to(weight_VH.dtype)
            for grad, main in zip((added.weight_VH, added.bias_V), ctx.main_grads, strict=True)
        ]
        return added.hidden_NH, left[0], left[1], None, None


def _places(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> _Gradients:
    """What the inputs' gradients are added to: main_grad where a parameter has one."""
    needs_hidden, *needs_head = ctx.needs_input_grad[:3]
    weight_and_bias = [
        (torch.zeros_like(p, dtype=torch.float32) if main is None else main)
        if needed and p is not None
        else None
        for p, main, needed in zip((weight_VH, bias_V), ctx.main_grads, needs_head, strict=True)
    ]
    return _Gradients(torch.empty_like(hidden_NH) if needs_hidden else None, *weight_and_bias)


def _in_chunks(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    task: _Task,
    grads: _Gradients | None,
    grad_logprobs_N: Tensor | None,
    grad_entropy_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies; what the gradients of both give is added to `grads`."""
    logprobs_N, entropy_N = (torch.zeros(len(hidden_NH)) for _ in range(2))
    logits_CV = hidden_NH.new_empty(task.rows, len(weight_VH))  # once: its pages are there for all chunks
    for start in range(0, len(hidden_NH), task.rows):
        stop = min(start + task.rows, len(hidden_NH))
        hidden_CH = padded(hidden_NH, start, stop, task.rows)
        if bias_V is None:
            torch.mm(hidden_CH, weight_VH.t(), out=logits_CV)
        else:
            torch.addmm(bias_V, hidden_CH, weight_VH.t(), out=logits_CV)
        extra_CV = None
        if grad_entropy_N is not None:  # d entropy / d logit = -p (log p + entropy)
            logp_CV = (logits_CV.float() / task.temperature).log_softmax(-1)
            p_CV = logp_CV.exp()
            negative_CV = p_CV * (logp_CV - (p_CV * logp_CV).sum(-1, keepdim=True))
            extra_CV = negative_CV * padded(-grad_entropy_N, start, stop, task.rows)[:, None]
        scales_C = None
        if grads is not None and grad_logprobs_N is not None:
            scales_C = padded(grad_logprobs_N, start, stop, task.rows) / task.temperature
        logprobs_C, _, entropy_C = native.target_logprobs_(  # with scales, logits become their gradient
            logits_CV,
            padded(task.targets_N, start, stop, task.rows),
            temperature=task.temperature,
            scales_N=scales_C,
        )
        logprobs_N[start:stop], entropy_N[start:stop] = (
            x_C[: stop - start] for x_C in (logprobs_C, entropy_C)
        )
        if extra_CV is not None:
            logits_CV.add_(extra_CV, alpha=1 / task.temperature)
        if grads is not None:
            grads.add(start, stop, logits_CV, hidden_CH, weight_VH)
    return logprobs_N, entropy_N


def _rows_per_chunk(num_rows: int, vocabulary: int, bytes_each: int, budget_bytes: int) -> int:
    """Rows whose logits fit the budget, MIN_ROWS at least; chunks are of the same size, few of their rows padding."""
    fitting = max(budget_bytes // (bytes_each * vocabulary), MIN_ROWS)
    num_chunks = max(-(-num_rows // fitting), 1)
    return max(-(-num_rows // num_chunks // ROUND_TO) * ROUND_TO, ROUND_TO)
