"""Losses: pure functions from token outputs to a weighted SUM and metric sums.

A loss is `loss(out, weights_N, *, <streams it needs>, <settings>) -> (sum, {name: sum})`. The Learner divides by
the step's one denominator. A loss that is linear in the log-probs says so with `is_linear`, which lets the head
compute its gradient in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kitae.algos import kl
from kitae.types import TokenOutputs

LossOutput = tuple[Tensor, dict[str, Tensor]]
LossFn = Callable[..., LossOutput]


def cross_entropy(out: TokenOutputs, weights_N: Tensor, **_unused: Any) -> LossOutput:
    """Negative log-likelihood of the taught tokens (SFT)."""
    return -(out.logprobs_N * weights_N).sum(), {}


cross_entropy.is_linear = True  # type: ignore[attr-defined]


def clipped_policy_gradient(
    out: TokenOutputs,
    weights_N: Tensor,
    *,
    advantages: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
) -> LossOutput:
    """PPO's clipped surrogate per token, with GRPO's k3 penalty (arXiv:2402.03300, eq. 3 and 4).

    advantages, old_logprobs and ref_logprobs are [N]; old_logprobs are the sampler's own. Metrics:
    clip_fraction (tokens whose gradient the clip removes), approx_kl (k3 to the sampler), and kl to the reference.
    """
    log_ratio_N = (out.logprobs_N - old_logprobs).clamp(-kl.MAX_LOG_RATIO, kl.MAX_LOG_RATIO)
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = -torch.minimum(ratio_N * advantages, clipped_N * advantages)
    with torch.no_grad():
        is_clipped_N = (clipped_N * advantages) < (ratio_N * advantages)
        metrics = {
            "clip_fraction": (is_clipped_N * weights_N).sum(),
            "approx_kl": ((ratio_N - 1 - log_ratio_N) * weights_N).sum(),
        }
    if ref_logprobs is not None:
        kl_N = kl.k3(out.logprobs_N, ref_logprobs)
        loss_N = loss_N + kl_coef * kl_N
        metrics["kl"] = (kl_N.detach() * weights_N).sum()
    return (loss_N * weights_N).sum(), metrics
