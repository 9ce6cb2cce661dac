"""The loss of a reward model, and how well its probabilities hold.

Rows come in pairs: rows 2p and 2p + 1 of a batch are the chosen and the rejected completion of pair p, each with one
prediction, whose value is the score of the whole row. The loss is a sum over pairs, as are the metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kitae.algos.losses import LossOutput
from kitae.types import TokenOutputs

NUM_BINS = 10


def bradley_terry(
    out: TokenOutputs, _weights_N: Tensor, *, margin: Tensor | None = None, center_coef: float = 0.0
) -> LossOutput:
    """-log sigmoid(r_chosen - r_rejected) per pair (arXiv:2203.02155, eq. 1), each pair counting 1.

    `margin` [B], equal in both rows of a pair, is taken from the difference (arXiv:2307.09288, eq. 2). center_coef
    adds center_coef x (r_chosen + r_rejected)^2, which pulls the mean score to 0 (arXiv:2312.09244, eq. 2).
    """
    assert out.values_N is not None, "a reward model's loss needs values"
    scores_B = out.per_row(out.values_N)
    chosen_P, rejected_P = scores_B[0::2], scores_B[1::2]
    difference_P = chosen_P - rejected_P
    loss_P = -F.logsigmoid(difference_P if margin is None else difference_P - margin[0::2])
    if center_coef:
        loss_P = loss_P + center_coef * (chosen_P + rejected_P).square()
    with torch.no_grad():
        metrics = {
            "margin": difference_P.sum(),
            "accuracy": (difference_P > 0).float().sum(),
            "chosen_reward": chosen_P.sum(),
            "rejected_reward": rejected_P.sum(),
            "reward": (chosen_P + rejected_P).sum() / 2,
        }
    return loss_P.sum(), metrics


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How often a reward model is right where it says how sure it is."""

    error: float
    """Expected calibration error."""
    bins: list[dict[str, Any]]
    """One JSON object per bin that holds pairs."""


def calibration(differences: Sequence[float]) -> Calibration:
    """Compare sigmoid(|r_chosen - r_rejected|), how sure the model is of its choice, with how often the choice is right.

    The confidences lie in [0.5, 1], which NUM_BINS equal bins cut. The error is the mean over pairs of the distance
    between confidence and share of right choices in the pair's bin (arXiv:1706.04599, eq. 3). Equal scores count half.
    """
    bins: list[list[tuple[float, float]]] = [[] for _ in range(NUM_BINS)]
    for difference in differences:
        confidence = 1 / (1 + math.exp(-min(abs(difference), 700.0)))
        right = 0.5 if difference == 0 else float(difference > 0)
        number = min(int((confidence - 0.5) * 2 * NUM_BINS), NUM_BINS - 1)
        bins[number].append((confidence, right))
    table, error = [], 0.0
    for number, pairs in enumerate(bins):
        if not pairs:
            continue
        confidence = math.fsum(c for c, _ in pairs) / len(pairs)
        right = math.fsum(r for _, r in pairs) / len(pairs)
        error += abs(confidence - right) * len(pairs) / len(differences)
        low, high = (0.5 + n / (2 * NUM_BINS) for n in (number, number + 1))
        table.append(
            {
                "from": low,
                "to": high,
                "pairs": len(pairs),
                "mean_confidence": confidence,
                "share_right": right,
            }
        )
    return Calibration(error=error, bins=table)
