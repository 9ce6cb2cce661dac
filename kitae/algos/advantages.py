"""From rewards to advantages."""

from __future__ import annotations

import torch
from torch import Tensor


def group_relative(rewards_PG: Tensor, *, scale_by_std: bool = True, epsilon: float = 1e-4) -> Tensor:
    """Reward minus the group's mean, over the group's standard deviation (GRPO, arXiv:2402.03300, §4.1.2).

    NaN marks a completion that could not be scored: it gets 0 and counts neither in the mean nor in the
    deviation. A group whose rewards are all equal, or with fewer than two scored, gets zeros. The deviation is
    the sample's (n - 1). Without the division it is Dr. GRPO's (arXiv:2503.20783).
    Example: [0, 1, 10] -> [-0.67, -0.48, 1.15].
    """
    scored_PG = ~rewards_PG.isnan()
    count_P1 = scored_PG.sum(-1, keepdim=True)
    filled_PG = rewards_PG.nan_to_num(0.0)
    mean_P1 = filled_PG.sum(-1, keepdim=True) / count_P1.clamp(min=1)
    centered_PG = torch.where(scored_PG & ~is_dead(rewards_PG)[:, None], rewards_PG - mean_P1, 0.0)
    if not scale_by_std:
        return centered_PG
    variance_P1 = centered_PG.square().sum(-1, keepdim=True) / (count_P1 - 1).clamp(min=1)
    return centered_PG / (variance_P1.sqrt() + epsilon)


def is_dead(rewards_PG: Tensor) -> Tensor:
    """True for each group that teaches nothing: fewer than two scored completions, or all rewards equal."""
    low_P = rewards_PG.nan_to_num(torch.inf).amin(-1)
    high_P = rewards_PG.nan_to_num(-torch.inf).amax(-1)
    return ((~rewards_PG.isnan()).sum(-1) < 2) | (low_P == high_P)
