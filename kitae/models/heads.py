"""Log-probs of only the tokens that count, in chunks: [tokens, vocabulary] logits never exist at once.

    hidden_NH, head --chunk--> logits --float32, temperature, kept ids--> logprobs_N, entropy_N

The gradient is recomputed chunk by chunk in the backward, or, where the loss is linear in the log-probs and its
coefficients are known ahead, computed in the forward. Chunking as in arXiv:2411.09009 (Cut Cross-Entropy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kitae.models.kept import Kept

BUDGET_BYTES = {"cpu": 12 << 20}
"""Bytes of logits alive at once: about a CPU's cache."""
DEFAULT_BUDGET_BYTES = 256 << 20
"""The same on every other device."""
MIN_ROWS, ROUND_TO = 128, 64


def plain_logprobs(
    logits_NV: Tensor, targets_N: Tensor, *, temperature: float = 1.0, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropy of each row, from full logits: the seam switched off."""
    logits_NV = logits_NV.float() / temperature
    if kept is not None:
        logits_NV = logits_NV.clone()
        kept.mask_(logits_NV, 0, len(targets_N))
    all_NV = logits_NV.log_softmax(-1)
    entropy_N = -(all_NV.exp() * all_NV).sum(-1)
    return all_NV.gather(1, targets_N[:, None]).squeeze(1), entropy_N


def chunked_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    kept: Kept | None = None,
    with_entropy: bool = False,
    coefficients_N: Tensor | None = None,
    budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same in chunks of `budget_bytes`, from hidden states and the head's weights; entropy when asked.

    `coefficients_N` is d loss / d logprob where it is known ahead; the backward checks that they are what arrives.
    A weight with a float32 `main_grad` gets its gradient added there, and none in `.grad`.
    """
    if budget_bytes is None:
        budget_bytes = BUDGET_BYTES.get(hidden_NH.device.type, DEFAULT_BUDGET_BYTES)
    rows = rows_per_chunk(len(hidden_NH), len(weight_VH), budget_bytes)
    task = _Task(targets_N, temperature, kept, with_entropy, rows)
    outputs = _Chunked.apply(hidden_NH, weight_VH, bias_V, task, coefficients_N)  # type: ignore[no-untyped-call]
    logprobs_N, entropy_N = outputs
    return logprobs_N, entropy_N if with_entropy else None


def rows_per_chunk(num_rows: int, vocabulary: int, budget_bytes: int) -> int:
    """Rows whose logits, in two bytes and in four, fit the budget; shapes repeat, so a multiple of ROUND_TO."""
    fitting = budget_bytes // (6 * vocabulary) // ROUND_TO * ROUND_TO
    return min(-(-max(num_rows, 1) // ROUND_TO) * ROUND_TO, max(MIN_ROWS, fitting))


@dataclass(frozen=True, slots=True)
class _Task:
    targets_N: Tensor
    temperature: float
    kept: Kept | None
    with_entropy: bool
    rows: int


@dataclass(slots=True)
class Gradients:
    """Gradients of one call; the head's are summed over chunks in float32. None: not needed."""

    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(
        cls, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, needs: Sequence[bool]
    ) -> Gradients:
        return cls(
            torch.empty_like(hidden_NH) if needs[0] else None,
            torch.zeros_like(weight_VH, dtype=torch.float32) if needs[1] else None,
            torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and needs[2] else None,
        )

    def add(self, start: int, stop: int, grad_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
        low_CV = grad_CV.to(weight_VH.dtype)
        if self.hidden_NH is not None:
            self.hidden_NH[start:stop] = (low_CV @ weight_VH)[: stop - start]
        if self.weight_VH is not None:
            self.weight_VH.add_(low_CV.t() @ hidden_CH)
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
        n = len(hidden_NH)
        # Three tensors and not views of one: FSDP warns of outputs that are views.
        logprobs_N, lse_N, entropy_N = (torch.zeros(n, device=hidden_NH.device) for _ in range(3))
        eager = None
        if coefficients_N is not None and any(ctx.needs_input_grad[:3]):
            eager = Gradients.zeros(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
        for start in range(0, n, task.rows):
            stop = min(start + task.rows, n)
            hidden_CH, logits_CV = _logits(hidden_NH, weight_VH, bias_V, task, start, stop)
            targets_C1 = padded(task.targets_N, start, stop, task.rows)[:, None]
            largest_C1 = logits_CV.amax(-1, keepdim=True)
            target_C1 = logits_CV.sub_(largest_C1).gather(1, targets_C1)
            # Once: it is a third of the head's work.
            exp_CV = logits_CV.exp() if task.with_entropy else logits_CV.exp_()
            sum_C1 = exp_CV.sum(-1, keepdim=True)
            logprobs_N[start:stop] = (target_C1 - sum_C1.log())[: stop - start, 0]
            lse_N[start:stop] = (largest_C1 + sum_C1.log())[: stop - start, 0]
            if task.with_entropy:
                entropy_C = sum_C1.log()[:, 0] - (exp_CV / sum_C1).mul_(logits_CV).sum(-1)
                entropy_N[start:stop] = entropy_C[: stop - start]
            if eager is not None and coefficients_N is not None:
                grad_C1 = padded(coefficients_N, start, stop, task.rows)[:, None] / task.temperature
                exp_CV.mul_(-grad_C1 / sum_C1).scatter_add_(1, targets_C1, grad_C1)  # see _to_gradient_
                eager.add(start, stop, exp_CV, hidden_CH, weight_VH)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, lse_N, entropy_N)
        ctx.task, ctx.coefficients_N, ctx.eager = task, coefficients_N, eager
        ctx.main_grads = [getattr(p, "main_grad", None) for p in (weight_VH, bias_V)]
        if not task.with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden_NH, weight_VH, bias_V, lse_N, entropy_N = ctx.saved_tensors
        task: _Task = ctx.task
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(lse_N)
        as_foretold = ctx.eager is not None and torch.equal(grad_logprobs_N, ctx.coefficients_N)
        if as_foretold and grad_entropy_N is None:
            return *hand_over(ctx.eager, weight_VH.dtype, ctx.main_grads), None, None
        grads = Gradients.zeros(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
        for start in range(0, len(hidden_NH), task.rows):
            stop = min(start + task.rows, len(hidden_NH))

            def column(x_N: Tensor, start: int = start, stop: int = stop) -> Tensor:
                return padded(x_N, start, stop, task.rows)[:, None]

            hidden_CH, logits_CV = _logits(hidden_NH, weight_VH, bias_V, task, start, stop)
            lse_C1, extra_CV = column(lse_N), None
            if grad_entropy_N is not None:  # d entropy / d logit = -p (log p + entropy)
                logp_CV = logits_CV - lse_C1
                extra_CV = -column(grad_entropy_N) * logp_CV.exp() * (logp_CV + column(entropy_N))
            grad_C1 = column(grad_logprobs_N) / task.temperature
            _to_gradient_(logits_CV, column(task.targets_N), lse_C1, grad_C1)
            if extra_CV is not None:
                logits_CV.add_(extra_CV, alpha=1 / task.temperature)
            grads.add(start, stop, logits_CV, hidden_CH, weight_VH)
        return *hand_over(grads, weight_VH.dtype, ctx.main_grads), None, None


def _logits(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, task: _Task, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Hidden states of one chunk, padded to the chunk's rows, and its tempered, masked float32 logits."""
    hidden_CH = padded(hidden_NH, start, stop, task.rows)
    logits_CV = F.linear(hidden_CH, weight_VH, bias_V).float()
    if task.temperature != 1.0:
        logits_CV.div_(task.temperature)
    if task.kept is not None:
        task.kept.mask_(logits_CV, start, stop)
    return hidden_CH, logits_CV


def _to_gradient_(logits_CV: Tensor, targets_C1: Tensor, lse_C1: Tensor, grad_C1: Tensor) -> None:
    """Turn logits into grad x d logprob / d logit = grad x (onehot - p), in place."""
    logits_CV.sub_(lse_C1).exp_().mul_(-grad_C1).scatter_add_(1, targets_C1, grad_C1)


def padded(x_N: Tensor, start: int, stop: int, rows: int) -> Tensor:
    """Rows start:stop, filled up with zeros to `rows`: the last chunk has the others' shape."""
    missing = rows - (stop - start)
    own = x_N[start:stop]
    return F.pad(own, (0, 0) * (x_N.dim() - 1) + (0, missing)) if missing else own


def hand_over(
    grads: Gradients, dtype: torch.dtype, main_grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The head's gradients go to the parameters' float32 main_grad where they have one, else to `.grad`."""
    head: list[Tensor | None] = []
    for grad, main in zip((grads.weight_VH, grads.bias_V), main_grads, strict=True):
        if grad is not None and main is not None:
            main.add_(grad)
            grad = None
        head.append(None if grad is None else grad.to(dtype))
    return grads.hidden_NH, head[0], head[1]
