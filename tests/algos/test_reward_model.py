"""The Bradley-Terry loss against its formula, calibration against counting by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from kitae.algos.reward_model import bradley_terry, calibration
from kitae.types import TokenOutputs


def outputs(scores: list[float]) -> tuple[TokenOutputs, torch.Tensor]:
    values_N = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    out = TokenOutputs(
        torch.zeros(0), values_N=values_N, row_N=torch.arange(len(scores)), num_rows=len(scores)
    )
    return out, values_N


SCORES = [1.5, -0.5, 0.2, 0.9, -3.0, -3.0, 40.0, -40.0]


@pytest.mark.parametrize("center_coef", [0.0, 0.01])
@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 1.0, 2.0]])
def test_loss_and_gradient_are_those_of_the_formula(margins, center_coef):
    out, values_N = outputs(SCORES)
    given = {} if margins is None else {"margin": torch.tensor(margins).repeat_interleave(2)}
    loss, metrics = bradley_terry(out, torch.ones(8), center_coef=center_coef, **given)
    loss.backward()

    # arXiv:2203.02155, eq. 1 with arXiv:2307.09288, eq. 2 and arXiv:2312.09244, eq. 2, pair by pair.
    expected, gradient = 0.0, []
    for p in range(4):
        chosen, rejected = SCORES[2 * p], SCORES[2 * p + 1]
        logit = chosen - rejected - (margins[p] if margins else 0.0)
        expected += math.log1p(math.exp(-logit)) + center_coef * (chosen + rejected) ** 2
        pull = 1 - 1 / (1 + math.exp(-logit))
        centre = 2 * center_coef * (chosen + rejected)
        gradient += [-pull + centre, pull + centre]
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert values_N.grad.tolist() == pytest.approx(gradient, rel=1e-6, abs=1e-12)

    assert metrics["accuracy"].item() == 2  # equal scores are no right choice
    assert metrics["margin"].item() == pytest.approx(2.0 - 0.7 + 0.0 + 80.0)
    assert metrics["reward"].item() == pytest.approx(sum(SCORES) / 2)
    assert metrics["chosen_reward"].item() == pytest.approx(sum(SCORES[0::2]))
    assert metrics["rejected_reward"].item() == pytest.approx(sum(SCORES[1::2]))


def test_calibration_error_is_the_mean_distance_of_confidence_and_share():
    rng = random.Random(0)
    differences = [rng.gauss(0.5, 1.5) for _ in range(200)]
    expected = 0.0
    for number in range(10):
        low, high = 0.5 + number / 20, 0.5 + (number + 1) / 20
        inside = [d for d in differences if low <= 1 / (1 + math.exp(-abs(d))) < high]
        if inside:
            confidence = sum(1 / (1 + math.exp(-abs(d))) for d in inside) / len(inside)
            right = sum(d > 0 for d in inside) / len(inside)
            expected += abs(confidence - right) * len(inside) / len(differences)
    found = calibration(differences)
    assert found.error == pytest.approx(expected, abs=1e-12)
    assert sum(row["pairs"] for row in found.bins) == 200
    assert [row["from"] for row in found.bins] == sorted(row["from"] for row in found.bins)


def test_a_model_that_is_as_often_right_as_it_says_is_calibrated_and_a_boastful_one_is_not():
    honest = [math.log(3)] * 30 + [-math.log(3)] * 10  # says 75 %, is right 30 times of 40
    assert calibration(honest).error == pytest.approx(0.0, abs=1e-12)
    assert calibration([20 * d for d in honest]).error == pytest.approx(0.25, abs=1e-6)
    assert calibration([0.0] * 8).error == 0.0  # undecided, and right half the time
    assert calibration([1e9]).bins[0]["to"] == 1.0
