"""Advantages by other baselines and scales than GRPO's own (advantages.group_relative).

"group" is the group's mean; "rloo" the mean of the others in the group; "reinforce++" the group's mean, normalised over
the whole round. Sums over the round go over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kitae.algos.advantages import group_relative, is_dead

Baseline = Literal["group", "rloo", "reinforce++"]
Scale = Literal["group", "batch", "none"]
EPSILON = 1e-4


def estimate(
    rewards_PG: Tensor,
    *,
    baseline: Baseline,
    scale: Scale,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """Advantages [P, G] of this rank's groups; NaN marks a completion that could not be scored, and gets 0.

    `scale` is for the baseline "group" only. "batch" divides by the deviation of all rewards of the round. A dead group
    gets zeros whatever the baseline. Every rank calls this, with no groups too.
    """
    if baseline == "rloo":
        return leave_one_out(rewards_PG)
    centered_PG = group_relative(rewards_PG, scale_by_std=baseline == "group" and scale == "group")
    if baseline == "reinforce++":
        # arXiv:2501.03262, REINFORCE++-baseline: subtract the group's mean, then normalise over the global batch.
        kept_PG = centered_PG.masked_fill(rewards_PG.isnan(), torch.nan)
        mean, std = _mean_and_std(kept_PG, sum_over_ranks)
        is_taught_PG = ~rewards_PG.isnan() & ~is_dead(rewards_PG)[:, None]
        return torch.where(is_taught_PG, (centered_PG - mean) / (std + EPSILON), 0.0)
    if scale == "batch":
        _, std = _mean_and_std(rewards_PG, sum_over_ranks)
        return centered_PG / (std + EPSILON)
    return centered_PG


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """Reward minus the mean of the group's other rewards (RLOO, arXiv:2402.14740, section 3.3).

    Example: [0, 1, 11] -> [-6, -4.5, 10.5].
    """
    count_P1 = (~rewards_PG.isnan()).sum(-1, keepdim=True)
    centered_PG = group_relative(rewards_PG, scale_by_std=False)
    # r - sum of others / (n - 1) = (r - mean) n / (n - 1)
    return centered_PG * count_P1 / (count_P1 - 1).clamp(min=1)


def _mean_and_std(values_PG: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Of the numbers of all ranks that are not NaN; the deviation is the sample's (n - 1)."""
    found = values_PG[~values_PG.isnan()].double()
    total, count = sum_over_ranks(
        torch.tensor([float(found.sum()), len(found)], dtype=torch.float64)
    ).tolist()
    mean = total / max(count, 1)
    squares = sum_over_ranks(torch.tensor([float((found - mean).square().sum())], dtype=torch.float64)).item()
    return mean, (squares / max(count - 1, 1)) ** 0.5
