"""Estimators of the KL divergence from the reference to the policy, per sampled token."""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp() of a larger difference of log-probs would only add infinities."""


def k3(logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
    """Schulman's k3: r - log r - 1 with r = reference / policy; unbiased and never negative.

    arXiv:2402.03300, eq. 4; http://joschu.net/blog/kl-approx.html.
    """
    log_ratio_N = (ref_logprobs_N - logprobs_N).clamp(max=MAX_LOG_RATIO)
    return log_ratio_N.exp() - log_ratio_N - 1
