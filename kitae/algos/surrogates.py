"""Variants of the clipped surrogate: ratios of whole completions, CISPO, dual clip, entropy bonus, truncated weights.

Each is a setting of GRPO; with none of them the loss is losses.clipped_policy_gradient. Papers: arXiv:2507.18071 (GSPO),
arXiv:2506.13585 (CISPO), arXiv:1912.09729 (dual clip), arXiv:2503.14476 (clip-higher).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kitae.algos import kl
from kitae.algos.losses import LossOutput
from kitae.types import TokenOutputs

Objective = Literal["clip", "cispo"]
Ratio = Literal["token", "sequence"]


def policy_gradient(
    out: TokenOutputs,
    weights_N: Tensor,
    *,
    advantages: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    objective: Objective = "clip",
    ratio: Ratio = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    is_cap: float = 0.0,
) -> LossOutput:
    """The surrogate that the settings describe, with GRPO's k3 penalty and an entropy bonus.

    All streams are [N]. With is_cap > 0, old_logprobs are the learner's own from before the round's updates and
    sampler_logprobs the sampler's. Metrics as clipped_policy_gradient's.
    """
    log_ratio_N = (out.logprobs_N - old_logprobs).clamp(-kl.MAX_LOG_RATIO, kl.MAX_LOG_RATIO)
    ratio_N = (sequence_log_ratio(out, old_logprobs) if ratio == "sequence" else log_ratio_N).exp()
    if objective == "cispo":
        loss_N, is_clipped_N = _cispo(out.logprobs_N, ratio_N, advantages, clip_high=clip_high)
    else:
        bounds = (1 - clip_low, 1 + clip_high)
        loss_N, is_clipped_N = _clipped(ratio_N, advantages, bounds=bounds, dual_clip=dual_clip)
    metrics = {
        "clip_fraction": (is_clipped_N * weights_N).sum(),
        "approx_kl": ((log_ratio_N.exp() - 1 - log_ratio_N).detach() * weights_N).sum(),
    }
    if is_cap:
        assert sampler_logprobs is not None, "is_cap needs the sampler's log-probs"
        loss_N = loss_N * truncated_weights(old_logprobs, sampler_logprobs, cap=is_cap)
    if ref_logprobs is not None:
        kl_N = kl.k3(out.logprobs_N, ref_logprobs)
        loss_N = loss_N + kl_coef * kl_N
        metrics["kl"] = (kl_N.detach() * weights_N).sum()
    if entropy_coef:
        assert out.entropy_N is not None, "the entropy bonus needs entropies"
        loss_N = loss_N - entropy_coef * out.entropy_N
    return (loss_N * weights_N).sum(), metrics


def sequence_log_ratio(out: TokenOutputs, old_logprobs_N: Tensor) -> Tensor:
    """Each token gets its completion's mean log ratio: the log of GSPO's s_i (arXiv:2507.18071, eq. 7).

    The gradient flows through the mean, so to every token of the completion. A completion is one row, and a row is
    never cut over forward passes.
    """
    assert out.row_N is not None, "a sequence's ratio needs to know the rows"
    total_B = out.per_row(out.logprobs_N - old_logprobs_N)
    count_B = out.per_row(torch.ones_like(old_logprobs_N))
    mean_B = (total_B / count_B.clamp(min=1)).clamp(-kl.MAX_LOG_RATIO, kl.MAX_LOG_RATIO)
    return mean_B[out.row_N]


def _clipped(
    ratio_N: Tensor, advantages_N: Tensor, *, bounds: tuple[float, float], dual_clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's clip per token, and where it takes the gradient away.

    dual_clip also bounds what a negative advantage can cost (arXiv:1912.09729, eq. 5): max(min(...), c A).
    """
    clipped_N = ratio_N.clamp(*bounds)
    bounded_N = ratio_N.clamp(max=dual_clip) if dual_clip else ratio_N
    is_clipped_N = (clipped_N * advantages_N) < (bounded_N * advantages_N)
    is_clipped_N |= (bounded_N < ratio_N) & (advantages_N < 0)
    return -torch.minimum(bounded_N * advantages_N, clipped_N * advantages_N), is_clipped_N


def _cispo(
    logprobs_N: Tensor, ratio_N: Tensor, advantages_N: Tensor, *, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Every token keeps its gradient, weighed by a ratio that is bounded above (arXiv:2506.13585, eq. 4 and 5).

    The paper sets no lower bound either.
    """
    weight_N = ratio_N.detach().clamp(max=1 + clip_high)
    return -weight_N * advantages_N * logprobs_N, weight_N < ratio_N.detach()


def truncated_weights(old_logprobs_N: Tensor, sampler_logprobs_N: Tensor, *, cap: float) -> Tensor:
    """min(pi_old / pi_sampler, cap) per token, for a sampler that computes otherwise than the learner.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"; the cap is Ionides' of 2008).
    """
    gap_N = (old_logprobs_N - sampler_logprobs_N).clamp(-kl.MAX_LOG_RATIO, kl.MAX_LOG_RATIO)
    return gap_N.exp().clamp(max=cap)
