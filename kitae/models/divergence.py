"""What a teacher says about each prediction, and how far the student is from it, in chunks of predictions.

    student's hidden_NH, head --chunk--> log q ---+
                                                  +--> divergence_N, and its gradient by the student's side only
    teacher's hidden_NH, or k best tokens --> log p

Neither model's [tokens, vocabulary] logits ever exist at once. Where the loss is weights_N . divergence_N + ce_coef x
cross-entropy, its gradient is known up to one factor in the forward pass, and the backward only multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kitae.algos.distillation import Divergence
from kitae.models import heads
from kitae.models.policy import Policy
from kitae.types import Batch, TokenOutputs

TENSORS_PER_CHUNK = 4
"""Tensors of a chunk's [rows, vocabulary] that are alive at once, beyond the one that heads.py counts."""


class Targets(NamedTuple):
    """The teacher's distribution of each prediction of a chunk."""

    logp_CB: Tensor
    """Log-probabilities of the outcomes: every token, or the k likeliest and last all others together."""
    ids_CK: Tensor | None
    """The k likeliest tokens; None where every token is an outcome."""
    logprobs_C: Tensor | None
    """The teacher's log-prob of each target at temperature 1, where it was asked for."""


class SoftTargets(Protocol):
    """The teacher's side of N predictions."""

    @property
    def num_columns(self) -> int:
        """The comparison is over token ids below this, which both models have."""
        ...

    def chunk(self, start: int, stop: int, rows: int, targets_C: Tensor) -> Targets:
        """Of predictions start:stop, filled up to `rows` with anything finite."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FromStates:
    """A teacher whose hidden states are here."""

    hidden_NH: Tensor
    logits_of: Callable[[Tensor], Tensor]
    """Float32 logits of hidden states."""
    how: Divergence
    num_columns: int
    with_logprobs: bool = False

    def chunk(self, start: int, stop: int, rows: int, targets_C: Tensor) -> Targets:
        logits_CV = self.logits_of(heads.padded(self.hidden_NH, start, stop, rows))[:, : self.num_columns]
        logprobs_C = None
        if self.with_logprobs:
            logprobs_C = logits_CV.gather(1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(-1)
        logp_CV = (logits_CV / self.how.temperature).log_softmax(-1)
        if not self.how.top_k:
            return Targets(logp_CV, None, logprobs_C)
        ids_CK = logp_CV.topk(self.how.top_k, dim=-1).indices
        return Targets(bucketed(logp_CV, ids_CK), ids_CK, logprobs_C)


@dataclass(frozen=True, slots=True, kw_only=True)
class FromTopK:
    """What is known of a teacher that is not here: its k likeliest tokens, and the mass of all others."""

    ids_NK: Tensor
    logp_NB: Tensor
    num_columns: int

    def chunk(self, start: int, stop: int, rows: int, targets_C: Tensor) -> Targets:
        return Targets(
            heads.padded(self.logp_NB, start, stop, rows), heads.padded(self.ids_NK, start, stop, rows), None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTeacher:
    """A frozen model that scores the same packed rows when their forward pass comes; see types.Teacher."""

    policy: Policy
    how: Divergence
    num_columns: int
    ce_coef: float | None = None
    """The loss is weights . divergence + ce_coef x cross-entropy; None: another one."""
    with_logprobs: bool = False
    """Give its log-probs of the targets too."""

    @torch.no_grad()
    def soft_targets(self, batch: Batch) -> FromStates:
        """The teacher's forward pass over a batch."""
        return FromStates(
            hidden_NH=self.policy.predicting(batch),
            logits_of=self.policy.logits,
            how=self.how,
            num_columns=self.num_columns,
            with_logprobs=self.with_logprobs,
        )

    def compare(self, student: Policy, batch: Batch, hidden_NH: Tensor) -> TokenOutputs:
        soft = self.soft_targets(batch)
        return compared(student, batch, hidden_NH, soft=soft, how=self.how, ce_coef=self.ce_coef)

    @torch.no_grad()
    def top_k(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids [N, k] of the likeliest tokens, and log-probs [N, k + 1] of these and of all others together."""
        soft, targets_N = self.soft_targets(batch), batch.targets_N.to(self.policy.device)
        rows = _rows_per_chunk(len(targets_N), self.num_columns, targets_N.device)
        ids, logp = [], []
        for start in range(0, len(targets_N), rows):
            stop = min(start + rows, len(targets_N))
            found = soft.chunk(start, stop, rows, heads.padded(targets_N, start, stop, rows))
            assert found.ids_CK is not None
            ids.append(found.ids_CK[: stop - start])
            logp.append(found.logp_CB[: stop - start])
        return torch.cat(ids), torch.cat(logp)


def bucketed(log_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """Log-probs [C, k + 1] of the tokens `ids_CK` and, last, of all other tokens together."""
    rest_C1 = log_CV.scatter(1, ids_CK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((log_CV.gather(1, ids_CK), rest_C1), -1)


def compared(
    student: Policy,
    batch: Batch,
    hidden_NH: Tensor,
    *,
    soft: SoftTargets,
    how: Divergence,
    ce_coef: float | None,
) -> TokenOutputs:
    """The student's log-probs of its targets at temperature 1, and its divergence from the teacher.

    The divergence is over the token ids that both models have. `ce_coef` as in LiveTeacher.
    """
    assert batch.temperature == 1.0 and batch.kept_ids_N is None, "a teacher compares whole distributions"
    targets_N = batch.targets_N.to(hidden_NH.device)
    if student.seams.head:
        head = student.causal_lm.get_output_embeddings()
        ahead = None
        if ce_coef is not None and torch.is_grad_enabled():
            weights_N = batch.weights_N.to(hidden_NH.device)
            unit_N = weights_N / weights_N.max().clamp(min=torch.finfo(torch.float32).tiny)
            ahead = (-ce_coef * unit_N, unit_N)
        found = chunked_divergence(
            hidden_NH, head.weight, head.bias, targets_N, soft=soft, how=how, coefficients=ahead
        )
    else:
        found = plain_divergence(student.logits(hidden_NH), targets_N, soft=soft, how=how)
    logprobs_N, divergence_N, teacher_logprobs_N = found
    return TokenOutputs(
        logprobs_N,
        divergence_N=divergence_N,
        row_N=batch.row_N.to(hidden_NH.device),
        num_rows=batch.num_rows,
        teacher_logprobs_N=teacher_logprobs_N,
    )


def plain_divergence(
    logits_NV: Tensor, targets_N: Tensor, *, soft: SoftTargets, how: Divergence
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs of the targets, divergences, and the teacher's log-probs, from full logits: the seam switched off."""
    target = soft.chunk(0, len(targets_N), len(targets_N), targets_N)
    logprobs_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
    logq_NB = (logits_NV[:, : soft.num_columns] / how.temperature).log_softmax(-1)
    if target.ids_CK is not None:
        logq_NB = bucketed(logq_NB, target.ids_CK)
    return logprobs_N, how.value(target.logp_CB, logq_NB), target.logprobs_C


def chunked_divergence(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    soft: SoftTargets,
    how: Divergence,
    coefficients: tuple[Tensor, Tensor] | None = None,
    budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same in chunks, from the student's hidden states and head.

    `coefficients` are d loss / d logprob and d loss / d divergence, up to one common factor, where they are known
    ahead; the backward checks that they are what arrives. A weight with a float32 `main_grad` gets its gradient there.
    """
    rows = _rows_per_chunk(len(targets_N), len(weight_VH), hidden_NH.device, budget_bytes)
    task = _Task(targets_N, soft, how, rows)
    outputs = _Compared.apply(hidden_NH, weight_VH, bias_V, task, coefficients)  # type: ignore[no-untyped-call]
    logprobs_N, divergence_N, teacher_logprobs_N = outputs
    return logprobs_N, divergence_N, teacher_logprobs_N


def _rows_per_chunk(
    num_rows: int, vocabulary: int, device: torch.device, budget_bytes: int | None = None
) -> int:
    if budget_bytes is None:
        budget_bytes = heads.BUDGET_BYTES.get(device.type, heads.DEFAULT_BUDGET_BYTES)
    return heads.rows_per_chunk(num_rows, vocabulary, budget_bytes // TENSORS_PER_CHUNK)


@dataclass(frozen=True, slots=True)
class _Task:
    targets_N: Tensor
    soft: SoftTargets
    how: Divergence
    rows: int


class _Chunk(NamedTuple):
    """One chunk's numbers, and what its gradient is made of."""

    hidden_CH: Tensor
    logits_CV: Tensor
    lse_C1: Tensor
    logprobs_C: Tensor
    divergence_C: Tensor
    teacher_logprobs_C: Tensor | None
    targets_C1: Tensor
    logq_CV: Tensor
    """The student's tempered log-probs of the teacher's columns."""
    slope_CB: Tensor
    """Derivative of the divergence by the student's log-prob of each outcome."""
    ids_CK: Tensor | None
    rest_C1: Tensor | None
    """The student's log-prob of all tokens outside ids_CK together."""


class _Compared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        task: _Task,
        coefficients: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        n = len(hidden_NH)
        logprobs_N, divergence_N, teacher_N = (torch.zeros(n, device=hidden_NH.device) for _ in range(3))
        has_teacher_logprobs = False
        eager, has_logprobs = None, False
        if coefficients is not None and any(ctx.needs_input_grad[:3]):
            has_logprobs = bool(coefficients[0].any())
            eager = heads.Gradients.zeros(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
        for start in range(0, n, task.rows):
            stop = min(start + task.rows, n)
            chunk = _compare(hidden_NH, weight_VH, bias_V, task, start, stop)
            logprobs_N[start:stop] = chunk.logprobs_C[: stop - start]
            divergence_N[start:stop] = chunk.divergence_C[: stop - start]
            if chunk.teacher_logprobs_C is not None:
                teacher_N[start:stop] = chunk.teacher_logprobs_C[: stop - start]
                has_teacher_logprobs = True
            if eager is not None and coefficients is not None:
                grad_CV = _gradient(chunk, task, coefficients, start, stop, has_logprobs=has_logprobs)
                eager.add(start, stop, grad_CV, chunk.hidden_CH, weight_VH)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V)
        ctx.task, ctx.coefficients, ctx.eager = task, coefficients, eager
        ctx.main_grads = [getattr(p, "main_grad", None) for p in (weight_VH, bias_V)]
        ctx.mark_non_differentiable(teacher_N)
        ctx.set_materialize_grads(False)
        return logprobs_N, divergence_N, teacher_N if has_teacher_logprobs else None

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs_N: Tensor | None, grad_divergence_N: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden_NH, weight_VH, bias_V = ctx.saved_tensors
        task: _Task = ctx.task
        zeros_N = torch.zeros(len(hidden_NH), device=hidden_NH.device)
        found = (
            zeros_N if grad_logprobs_N is None else grad_logprobs_N,
            zeros_N if grad_divergence_N is None else grad_divergence_N,
        )
        factor = None if ctx.eager is None else common_factor(ctx.coefficients, found)
        if factor is not None:
            grads: heads.Gradients = ctx.eager
            for grad in (grads.hidden_NH, grads.weight_VH, grads.bias_V):
                if grad is not None:
                    grad.mul_(factor)
            return *heads.hand_over(grads, weight_VH.dtype, ctx.main_grads), None, None
        grads = heads.Gradients.zeros(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
        has_logprobs = bool(found[0].any())
        for start in range(0, len(hidden_NH), task.rows):
            stop = min(start + task.rows, len(hidden_NH))
            chunk = _compare(hidden_NH, weight_VH, bias_V, task, start, stop)
            grad_CV = _gradient(chunk, task, found, start, stop, has_logprobs=has_logprobs)
            grads.add(start, stop, grad_CV, chunk.hidden_CH, weight_VH)
        return *heads.hand_over(grads, weight_VH.dtype, ctx.main_grads), None, None


def _compare(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, task: _Task, start: int, stop: int
) -> _Chunk:
    hidden_CH = heads.padded(hidden_NH, start, stop, task.rows)
    targets_C = heads.padded(task.targets_N, start, stop, task.rows)
    target = task.soft.chunk(start, stop, task.rows, targets_C)
    logits_CV = F.linear(hidden_CH, weight_VH, bias_V).float()
    lse_C1 = logits_CV.logsumexp(-1, keepdim=True)
    logprobs_C = (logits_CV.gather(1, targets_C[:, None]) - lse_C1)[:, 0]
    is_whole = task.how.temperature == 1.0 and task.soft.num_columns == logits_CV.shape[-1]
    if is_whole:
        logq_CV = logits_CV - lse_C1
    else:
        logq_CV = (logits_CV[:, : task.soft.num_columns] / task.how.temperature).log_softmax(-1)
    logq_CB, rest_C1 = logq_CV, None
    if target.ids_CK is not None:
        logq_CB = bucketed(logq_CV, target.ids_CK)
        rest_C1 = logq_CB[:, -1:]
    divergence_C, slope_CB = task.how.value_and_slope(target.logp_CB, logq_CB)
    return _Chunk(
        hidden_CH, logits_CV, lse_C1, logprobs_C, divergence_C, target.logprobs_C, targets_C[:, None],
        logq_CV, slope_CB, target.ids_CK, rest_C1,
    )  # fmt: skip


def _gradient(
    chunk: _Chunk,
    task: _Task,
    coefficients: tuple[Tensor, Tensor],
    start: int,
    stop: int,
    *,
    has_logprobs: bool,
) -> Tensor:
    """Derivative of coefficients . (logprobs, divergences) by the student's logits, which are used up."""
    by_logprob_C1, by_divergence_C1 = (
        heads.padded(c_N, start, stop, task.rows)[:, None] for c_N in coefficients
    )
    q_CV = chunk.logq_CV.exp()
    total_C1 = chunk.slope_CB.sum(-1, keepdim=True)
    if chunk.ids_CK is None or chunk.rest_C1 is None:  # softmax: d log q_b / d logit_v = [b = v] - q_v
        grad_CV = torch.addcmul(chunk.slope_CB, q_CV, total_C1, value=-1)
    else:  # a token outside the k moves the last outcome by its share of it
        share_CV = (chunk.logq_CV - chunk.rest_C1).exp()
        grad_CV = share_CV * chunk.slope_CB[:, -1:] - q_CV * total_C1
        own_CK = chunk.slope_CB[:, :-1] - q_CV.gather(1, chunk.ids_CK) * total_C1
        grad_CV.scatter_(1, chunk.ids_CK, own_CK)
    grad_CV.mul_(by_divergence_C1 / task.how.temperature)
    if missing := chunk.logits_CV.shape[-1] - grad_CV.shape[-1]:
        grad_CV = F.pad(grad_CV, (0, missing))
    if has_logprobs:
        p_CV = chunk.logits_CV.sub_(chunk.lse_C1).exp_()
        grad_CV.sub_(p_CV.mul_(by_logprob_C1)).scatter_add_(1, chunk.targets_C1, by_logprob_C1)
    return grad_CV


def common_factor(foretold: Sequence[Tensor], found: Sequence[Tensor]) -> float | None:
    """The number that turns the foretold coefficients into those found, but for rounding; None where there is none."""
    a, b = (torch.cat(list(parts)).cpu().double() for parts in (foretold, found))
    norm = a @ a
    factor = float(a @ b / norm) if norm > 0 else 0.0
    largest = float((a * factor).abs().max()) if len(a) else 0.0
    error = float((b - a * factor).abs().max()) if len(a) else 0.0
    return factor if error <= 1e-6 * largest else None
