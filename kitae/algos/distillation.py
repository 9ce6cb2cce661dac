"""How far a student's distribution is from its teacher's, and the loss made of it.

Over one set of outcomes, p is the teacher's distribution and q the student's, both given as log-probabilities:

    forward_kl  KL(p || q) = sum p (log p - log q)    covers all that the teacher may say
    reverse_kl  KL(q || p) = sum q (log q - log p)    keeps to what the teacher finds likely
    jsd         beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q    (arXiv:2306.13649, eq. 1)

jsd / beta tends to forward_kl as beta falls to 0, and jsd / (1 - beta) to reverse_kl as beta rises to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kitae.algos.losses import LossOutput
from kitae.types import TokenOutputs

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Which divergence, between which distributions; `value` is the sum over outcomes, the last dimension."""

    kind: Kind
    beta: float = 0.5
    """Weight of the teacher in the mixture of jsd."""
    temperature: float = 1.0
    """Both models' logits are divided by it. The divergence is not multiplied by its square."""
    top_k: int = 0
    """Outcomes are the teacher's k likeliest tokens and one for all others together; 0: every token is one."""

    def value(self, logp: Tensor, logq: Tensor) -> Tensor:
        """The divergence of each row; differentiable."""
        return self.value_and_slope(logp, logq)[0]

    def value_and_slope(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence of each row, and its derivative by each entry of logq as if those were free."""
        if self.kind == "forward_kl":
            p = logp.exp()
            return (p * (logp - logq)).sum(-1), -p
        if self.kind == "reverse_kl":
            q, log_ratio = logq.exp(), logq - logp
            return (q * log_ratio).sum(-1), q * (log_ratio + 1)
        logm = torch.logaddexp(logp + math.log(self.beta), logq + math.log1p(-self.beta))
        teacher = (logp.exp() * (logp - logm)).sum(-1)
        student = logq.exp() * (logq - logm)
        # m's own dependence on q cancels: beta p / m + (1 - beta) q / m = 1.
        return self.beta * teacher + (1 - self.beta) * student.sum(-1), (1 - self.beta) * student


def distillation(
    out: TokenOutputs, weights_N: Tensor, *, ce_coef: float = 0.0, is_sampled: bool = False, **_unused: Any
) -> LossOutput:
    """The divergence from the teacher, plus ce_coef times the cross-entropy of the tokens (arXiv:2306.13649, alg. 1).

    Metrics: divergence, cross_entropy, and where the student itself sampled the tokens (`is_sampled`) kl: log q - log p of
    these tokens at temperature 1, whose mean estimates KL(student || teacher) whatever divergence is trained.
    """
    assert out.divergence_N is not None, "these outputs were not compared with a teacher"
    divergence = (out.divergence_N * weights_N).sum()
    cross_entropy = -(out.logprobs_N * weights_N).sum()
    metrics = {"divergence": divergence.detach(), "cross_entropy": cross_entropy.detach()}
    if is_sampled:
        assert out.teacher_logprobs_N is not None, "the teacher did not score the sampled tokens"
        metrics["kl"] = ((out.logprobs_N.detach() - out.teacher_logprobs_N) * weights_N).sum()
    return divergence + ce_coef * cross_entropy if ce_coef else divergence, metrics
