"""Proximal policy optimization: from scores and a critic's values to advantages, and the losses on them.

    scores, KL --token_rewards--> rewards_BL --gae, values_BL--> advantages_BL --whiten--> clipped policy loss
                                                            \\--> returns_BL = advantages + values --> clipped value loss

Papers: arXiv:1707.06347 (PPO), arXiv:1506.02438 (GAE), arXiv:1909.08593 (KL penalty in the reward). Another letter:
    L tokens of a completion, rows filled up with zeros on the right
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kitae.algos.losses import LossFn, LossOutput, clipped_policy_gradient
from kitae.types import TokenOutputs


def token_rewards(scores_B: Tensor, kl_BL: Tensor, lengths_B: Tensor, *, kl_coef: float) -> Tensor:
    """Rewards [B, L]: -kl_coef x KL at every token, and the completion's score at its last one (arXiv:1909.08593, eq. 2).

    kl_BL is the k1 estimate log pi - log pi_ref of each sampled token, 0 behind a row's end.
    """
    rewards_BL = -kl_coef * kl_BL
    rewards_BL[torch.arange(len(lengths_B)), lengths_B - 1] += scores_B
    return rewards_BL


def gae(rewards_BL: Tensor, values_BL: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalized advantages [B, L]: sums of (gamma lam)^k delta_(t+k) over the rest of the row (arXiv:1506.02438, eq. 16).

    values_BL[b, t] is the critic's value of the state before token t; behind a row's last token it is 0, whether the
    completion ended by itself or was cut. Zeros on the right stay zeros, so rows of any lengths may share a tensor.
    """
    next_values_BL = torch.nn.functional.pad(values_BL[:, 1:], (0, 1))
    deltas_BL = rewards_BL + gamma * next_values_BL - values_BL
    advantages_BL = torch.zeros_like(deltas_BL)
    running_B = deltas_BL.new_zeros(len(deltas_BL))
    for t in reversed(range(deltas_BL.shape[1])):
        running_B = deltas_BL[:, t] + gamma * lam * running_B
        advantages_BL[:, t] = running_B
    return advantages_BL


def moments(numbers: Tensor) -> Tensor:
    """Count, sum and sum of squares in float64: what ranks add up, and `whiten` and `variance` take."""
    exact = numbers.double()
    count = torch.tensor(float(exact.numel()), dtype=torch.float64, device=exact.device)
    return torch.stack((count, exact.sum(), exact.square().sum()))


def variance(totals: Tensor) -> float:
    """The sample's variance (n - 1) of the numbers whose moments these are; 0 for fewer than two."""
    count, total, squares = totals.tolist()
    return max((squares - total * total / count) / (count - 1), 0.0) if count > 1 else 0.0


def whiten(numbers: Tensor, totals: Tensor, *, keep_mean: bool = False, epsilon: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) by the moments of all ranks; with keep_mean the mean is added again."""
    count, total, _ = totals.tolist()
    mean = total / max(count, 1.0)
    white: Tensor = (numbers - mean) / math.sqrt(variance(totals) + epsilon)
    return white + mean if keep_mean else white


class KLController:
    """Weight of the per-token KL penalty: fixed, or steered towards a KL per completion (arXiv:1909.08593, §2.2)."""

    def __init__(self, coef: float, *, target: float = 0.0, horizon: int = 10_000) -> None:
        """`target` is in nats per completion, 0 keeps `coef`; a larger `horizon` (in completions) moves it more slowly."""
        self.coef, self._target, self._horizon = coef, target, horizon

    def update(self, kl: float, *, completions: float) -> None:
        """Move after a round of so many completions with this mean KL, both over all ranks.

        e = clip(KL / target - 1, -0.2, 0.2), coef <- coef (1 + K e), with K = completions / horizon. Example: target 6,
        horizon 10000, 256 completions of KL 9 make a coefficient 0.5 % larger.
        """
        if self._target:
            error = min(max(kl / self._target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * completions / self._horizon

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


def policy_loss(
    out: TokenOutputs,
    weights_N: Tensor,
    *,
    advantages: Tensor,
    old_logprobs: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **_others: Any,
) -> LossOutput:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7); the critic's streams are passed over."""
    return clipped_policy_gradient(
        out,
        weights_N,
        advantages=advantages,
        old_logprobs=old_logprobs,
        clip_low=clip_low,
        clip_high=clip_high,
    )


def value_loss(
    out: TokenOutputs,
    weights_N: Tensor,
    *,
    returns: Tensor,
    old_values: Tensor,
    value_clip: float = 0.2,
    **_others: Any,
) -> LossOutput:
    """Half of max((v - R)^2, (clip(v, v_old +- value_clip) - R)^2): L^VF of arXiv:1707.06347, eq. 9, clipped.

    The clip is that of the authors' code (arXiv:2005.12729, §3); value_clip 0 leaves it out. Metric:
    value_clip_fraction (tokens whose gradient the clip removes).
    """
    assert out.values_N is not None, "a value loss needs a model with a value head"
    loss_N = (out.values_N - returns).square()
    if not value_clip:
        return 0.5 * (loss_N * weights_N).sum(), {"value_clip_fraction": torch.zeros_like(loss_N).sum()}
    moved_N = out.values_N - old_values
    clipped_N = old_values + moved_N.clamp(-value_clip, value_clip)
    # Within the range old + (v - old) is v but for rounding, which must not count as clipped.
    is_clipped_N = (moved_N.abs() > value_clip) & ((clipped_N - returns).square() > loss_N)
    loss_N = torch.where(is_clipped_N, (clipped_N - returns).square(), loss_N)
    return 0.5 * (loss_N * weights_N).sum(), {"value_clip_fraction": (is_clipped_N * weights_N).sum()}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What one model trains on, each part reported by its own name (arXiv:1707.06347, eq. 9).

    Policy loss - entropy_coef x entropy + value_coef x value loss; a critic of its own has only the last part.
    """

    policy: LossFn | None = None
    value: LossFn | None = None
    value_coef: float = 1.0
    entropy_coef: float = 0.0

    @property
    def needs_entropy(self) -> bool:
        """Read by the Learner: whether out.entropy_N is to be computed."""
        return self.entropy_coef > 0 or getattr(self.policy, "needs_entropy", False)

    def __call__(self, out: TokenOutputs, weights_N: Tensor, **streams: Tensor) -> LossOutput:
        total, metrics = weights_N.new_zeros(()), dict[str, Tensor]()
        if self.policy is not None:
            loss, more = self.policy(out, weights_N, **streams)
            total = total + loss
            metrics |= {"policy_loss": loss.detach(), **more}
        if self.entropy_coef:
            assert out.entropy_N is not None, "the Learner computes entropies for a loss with needs_entropy"
            total = total - self.entropy_coef * (out.entropy_N * weights_N).sum()
        if self.value is not None:
            loss, more = self.value(out, weights_N, **streams)
            total = total + self.value_coef * loss
            metrics |= {"value_loss": loss.detach(), **more}
        return total, metrics
