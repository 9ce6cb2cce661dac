"""heads.py's chunked log-probs where native.py has kernels: logits never become float32, and are read and written once.

hidden_NH, head --chunk--> logits --one pass--> logprobs_N, entropy_N, and in the logits' place their gradient
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kitae.models import native
from kitae.models.heads import BUDGET_BYTES, Gradients, hand_over, padded, rows_per_chunk


def chunked_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    coefficients_N: Tensor | None = None,
    budget_bytes: int = BUDGET_BYTES["cpu"],
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, as heads.chunked_logprobs gives them; native.fits the first three."""
    if len(targets_N):
        native.check_ids(targets_N, len(weight_VH))
    task = _Task(targets_N, temperature, rows_per_chunk(len(hidden_NH), len(weight_VH), budget_bytes))
    outputs: tuple[Tensor, Tensor] = _Chunked.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias_V, task, coefficients_N
    )
    return outputs


class _Task(NamedTuple):
    targets_N: Tensor
    temperature: float
    rows: int


class _Gradients(Gradients):
    """The head's gradient is added up without float32 copies of its parts."""

    def add(self, start: int, stop: int, grad_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
        if self.hidden_NH is not None:
            self.hidden_NH[start:stop] = (grad_CV @ weight_VH)[: stop - start]
        if self.weight_VH is not None:
            native.add_(self.weight_VH, grad_CV.t() @ hidden_CH)
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
        logprobs_N, entropy_N = (torch.zeros(len(hidden_NH)) for _ in range(2))
        eager = None
        if coefficients_N is not None and any(ctx.needs_input_grad[:3]):
            eager = _Gradients.zeros(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
        for start in range(0, len(hidden_NH), task.rows):
            stop = min(start + task.rows, len(hidden_NH))
            hidden_CH, logits_CV = _logits(hidden_NH, weight_VH, bias_V, task, start, stop)
            found = _to_gradient_(logits_CV, task, None if eager is None else coefficients_N, start, stop)
            logprobs_N[start:stop], entropy_N[start:stop] = (x_C[: stop - start] for x_C in found)
            if eager is not None:
                eager.add(start, stop, logits_CV, hidden_CH, weight_VH)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V)
        ctx.task, ctx.coefficients_N, ctx.eager = task, coefficients_N, eager
        ctx.main_grads = [getattr(p, "main_grad", None) for p in (weight_VH, bias_V)]
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden_NH, weight_VH, bias_V = ctx.saved_tensors
        task: _Task = ctx.task
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros(len(hidden_NH))
        as_foretold = ctx.eager is not None and torch.equal(grad_logprobs_N, ctx.coefficients_N)
        if as_foretold and grad_entropy_N is None:
            return *hand_over(ctx.eager, weight_VH.dtype, ctx.main_grads), None, None
        grads = _Gradients.zeros(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
        for start in range(0, len(hidden_NH), task.rows):
            stop = min(start + task.rows, len(hidden_NH))
            hidden_CH, logits_CV = _logits(hidden_NH, weight_VH, bias_V, task, start, stop)
            extra_CV = None
            if grad_entropy_N is not None:  # d entropy / d logit = -p (log p + entropy)
                logp_CV = (logits_CV.float() / task.temperature).log_softmax(-1)
                p_CV = logp_CV.exp()
                negative_CV = p_CV * (logp_CV - (p_CV * logp_CV).sum(-1, keepdim=True))
                extra_CV = negative_CV * padded(-grad_entropy_N, start, stop, task.rows)[:, None]
            _to_gradient_(logits_CV, task, grad_logprobs_N, start, stop)
            if extra_CV is not None:
                logits_CV.add_(extra_CV, alpha=1 / task.temperature)
            grads.add(start, stop, logits_CV, hidden_CH, weight_VH)
        return *hand_over(grads, weight_VH.dtype, ctx.main_grads), None, None


def _logits(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, task: _Task, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Hidden states of one chunk, padded to the chunk's rows, and their logits."""
    hidden_CH = padded(hidden_NH, start, stop, task.rows)
    return hidden_CH, F.linear(hidden_CH, weight_VH, bias_V)


def _to_gradient_(
    logits_CV: Tensor, task: _Task, grad_N: Tensor | None, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a chunk; with grad_N, the logits become their gradient."""
    targets_C = padded(task.targets_N, start, stop, task.rows)
    scales_C = None if grad_N is None else padded(grad_N, start, stop, task.rows) / task.temperature
    logprobs_C, _, entropy_C = native.target_logprobs_(
        logits_CV, targets_C, temperature=task.temperature, scales_N=scales_C
    )
    return logprobs_C, entropy_C
