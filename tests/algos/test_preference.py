"""The losses of preferences against their papers' formulas, written out with Python numbers and float64."""

import math
import random
from functools import partial

import pytest
import torch

from kitae.algos import preference
from kitae.types import TokenOutputs

LENGTHS = [5, 3, 1, 7, 2, 2]
"""Tokens of chosen and rejected of three pairs in turn."""


def outputs(seed=0, lengths=LENGTHS, *, low=-4.0, high=-0.01):
    """Outputs with a gradient, the same log-probs row by row in float64, and a reference number for each row."""
    rng = random.Random(seed)
    rows = [[rng.uniform(low, high) for _ in range(n)] for n in lengths]
    flat = torch.tensor([x for row in rows for x in row], requires_grad=True)
    row_N = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    reference = [sum(row) + rng.gauss(0, 1) for row in rows]
    slow = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in rows]
    return TokenOutputs(flat, row_N=row_N, num_rows=len(rows)), slow, reference


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def slow_dpo(rows, reference, *, beta, loss_type, label_smoothing, nll_coef):
    total = 0.0
    for w, l in zip(range(0, len(rows), 2), range(1, len(rows), 2), strict=True):  # noqa: E741 - the paper's letters
        ratio_w, ratio_l = rows[w].sum() - reference[w], rows[l].sum() - reference[l]
        if loss_type == "ipo":  # arXiv:2310.12036, eq. 17, with means over tokens
            h = ratio_w / len(rows[w]) - ratio_l / len(rows[l])
            loss = (h - 1 / (2 * beta)) ** 2
        else:  # arXiv:2305.18290, eq. 7
            right = -torch.log(sigmoid(beta * ratio_w - beta * ratio_l))
            wrong = -torch.log(sigmoid(beta * ratio_l - beta * ratio_w))
            e = label_smoothing
            loss = (1 - e) * right + e * wrong
            if loss_type == "robust":  # arXiv:2403.00409, eq. 8
                loss = ((1 - e) * right - e * wrong) / (1 - 2 * e)
        total = total + loss - nll_coef * rows[w].mean()
    return total


def slow_simpo(rows, *, beta, gamma, label_smoothing, nll_coef):
    total = 0.0
    for w, l in zip(rows[0::2], rows[1::2], strict=True):  # noqa: E741 - arXiv:2405.14734, eq. 6
        x = beta / len(w) * w.sum() - beta / len(l) * l.sum() - gamma
        loss = -(1 - label_smoothing) * torch.log(sigmoid(x)) - label_smoothing * torch.log(sigmoid(-x))
        total = total + loss - nll_coef * w.mean()
    return total


def slow_orpo(rows, *, odds_coef):
    total = 0.0
    for w, l in zip(rows[0::2], rows[1::2], strict=True):  # noqa: E741 - arXiv:2403.07691, eq. 3 to 7
        p_w, p_l = torch.exp(w.sum() / len(w)), torch.exp(l.sum() / len(l))
        ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
        total = total - w.sum() / len(w) - odds_coef * torch.log(sigmoid(torch.log(ratio)))
    return total


def slow_kto(rows, reference, labels, z0, *, beta, desirable_weight, undesirable_weight):
    total = 0.0
    for row, ref, label in zip(rows, reference, labels, strict=True):  # arXiv:2402.01306, eq. 8
        r = row.sum() - ref
        if label:
            total = total + desirable_weight - desirable_weight * sigmoid(beta * (r - z0))
        else:
            total = total + undesirable_weight - undesirable_weight * sigmoid(beta * (z0 - r))
    return total


def assert_same(out, loss, rows, expected):
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad_N,) = torch.autograd.grad(loss, out.logprobs_N)
    expected_N = torch.cat(torch.autograd.grad(expected, rows)).float()
    assert expected_N.abs().max() > 1e-3
    torch.testing.assert_close(grad_N, expected_N, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("nll_coef", [0.0, 0.3])
@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("ipo", 0.0)]
)
def test_dpo_is_the_papers_formula(loss_type, label_smoothing, nll_coef):
    how = {"beta": 0.4, "loss_type": loss_type, "label_smoothing": label_smoothing, "nll_coef": nll_coef}
    out, rows, reference = outputs()
    loss, metrics = preference.dpo(
        out, torch.ones_like(out.logprobs_N), ref_logprob=torch.tensor(reference), **how
    )
    assert_same(out, loss, rows, slow_dpo(rows, reference, **how))
    scores = [float(row.detach().sum()) - ref for row, ref in zip(rows, reference, strict=True)]
    if loss_type == "ipo":
        scores = [score / len(row) for score, row in zip(scores, rows, strict=True)]
    margins = [0.4 * (w - l) for w, l in zip(scores[0::2], scores[1::2], strict=True)]  # noqa: E741
    assert metrics["margin"].item() == pytest.approx(sum(margins), rel=1e-4)
    assert metrics["accuracy"].item() == sum(m > 0 for m in margins)
    assert metrics["chosen_reward"].item() == pytest.approx(0.4 * sum(scores[0::2]), rel=1e-4)
    assert metrics["rejected_reward"].item() == pytest.approx(0.4 * sum(scores[1::2]), rel=1e-4)
    means = [float(row.detach().mean()) for row in rows]
    assert metrics["chosen_logprob"].item() == pytest.approx(sum(means[0::2]), rel=1e-5)
    assert metrics["rejected_logprob"].item() == pytest.approx(sum(means[1::2]), rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(("label_smoothing", "nll_coef"), [(0.0, 0.0), (0.1, 0.5)])
def test_simpo_is_the_papers_formula(label_smoothing, nll_coef):
    how = {"beta": 2.0, "gamma": 0.7, "label_smoothing": label_smoothing, "nll_coef": nll_coef}
    out, rows, _ = outputs()
    loss, metrics = preference.simpo(out, torch.ones_like(out.logprobs_N), **how)
    assert_same(out, loss, rows, slow_simpo(rows, **how))
    assert metrics["chosen_reward"].item() == pytest.approx(
        2.0 * sum(float(row.detach().mean()) for row in rows[0::2]), rel=1e-5
    )


def test_orpo_is_the_papers_formula():
    out, rows, _ = outputs()
    loss, metrics = preference.orpo(out, torch.ones_like(out.logprobs_N), odds_coef=0.6)
    assert_same(out, loss, rows, slow_orpo(rows, odds_coef=0.6))
    odds = [float(torch.log(p / (1 - p))) for p in (torch.exp(row.detach().mean()) for row in rows)]
    assert metrics["margin"].item() == pytest.approx(sum(odds[0::2]) - sum(odds[1::2]), rel=1e-4)


def test_kto_is_the_papers_formula():
    how = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.8}
    out, rows, reference = outputs()
    labels, z0 = [1, 0, 0, 1, 1, 0], 0.37
    loss, metrics = preference.kto(
        out,
        torch.ones_like(out.logprobs_N),
        label=torch.tensor(labels, dtype=torch.float32),
        ref_logprob=torch.tensor(reference),
        reference_point=torch.full((6,), z0),
        **how,
    )
    assert_same(out, loss, rows, slow_kto(rows, reference, labels, z0, **how))
    ratios = [float(row.detach().sum()) - ref for row, ref in zip(rows, reference, strict=True)]
    means = preference.per_side({name: value.item() / 6 for name, value in metrics.items()})
    good = [0.5 * r for r, label in zip(ratios, labels, strict=True) if label]
    bad = [0.5 * r for r, label in zip(ratios, labels, strict=True) if not label]
    assert means["chosen_reward"] == pytest.approx(sum(good) / 3, rel=1e-4)
    assert means["rejected_reward"] == pytest.approx(sum(bad) / 3, rel=1e-4)
    assert means["margin"] == pytest.approx(sum(good) / 3 - sum(bad) / 3, rel=1e-4)
    assert means["accuracy"] == pytest.approx(
        sum((r > z0) == bool(label) for r, label in zip(ratios, labels, strict=True)) / 6
    )
    assert means["kl"] == pytest.approx(z0) and means["desirable"] == pytest.approx(0.5)


def test_a_side_without_rows_has_no_metrics():
    sums = {
        "loss": 1.0,
        "desirable": 1.0,
        "chosen_reward": 2.0,
        "rejected_reward": 0.0,
        "chosen_logprob": -1.0,
    }
    assert preference.per_side(sums) == {
        "loss": 1.0,
        "desirable": 1.0,
        "chosen_reward": 2.0,
        "chosen_logprob": -1.0,
    }


ALL = {
    "dpo": partial(preference.dpo, beta=0.1),
    "ipo": partial(preference.dpo, beta=0.1, loss_type="ipo"),
    "simpo": partial(preference.simpo, beta=2.0, gamma=1.0),
    "orpo": partial(preference.orpo, odds_coef=0.1),
}


@pytest.mark.parametrize("name", ALL)
def test_a_loss_is_a_sum_over_pairs(name):
    numbers = {"ref_logprob": torch.zeros(6)} if name in ("dpo", "ipo") else {}
    out, _, _ = outputs()
    whole, _ = ALL[name](out, torch.ones_like(out.logprobs_N), **numbers)
    parts = 0.0
    for first in (0, 2, 4):
        is_own = (out.row_N == first) | (out.row_N == first + 1)
        part = TokenOutputs(out.logprobs_N[is_own], row_N=out.row_N[is_own] - first, num_rows=2)
        own = {key: value[first : first + 2] for key, value in numbers.items()}
        parts += ALL[name](part, torch.ones(int(is_own.sum())), **own)[0].item()
    assert whole.item() == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("low", "high"), [(-1e-9, 0.0), (-60.0, -50.0)])
def test_extreme_log_probs_keep_loss_and_gradient_finite(name, low, high):
    """All but certain completions, and long ones that are all but impossible."""
    numbers = {"ref_logprob": torch.zeros(4)} if name in ("dpo", "ipo") else {}
    out, _, _ = outputs(lengths=[1, 40, 40, 1], low=low, high=high)
    loss, metrics = ALL[name](out, torch.ones_like(out.logprobs_N), **numbers)
    (grad_N,) = torch.autograd.grad(loss, out.logprobs_N)
    assert loss.isfinite() and grad_N.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


def test_log_odds_are_exact_from_near_certain_to_unlikely():
    """Against log p - log(1 - p) in float64, the second by expm1."""
    for x in (-1e-6, -1e-3, -0.5, -math.log(2), -0.7, -5.0, -30.0):
        out = TokenOutputs(torch.tensor([x, -1.0]), row_N=torch.tensor([0, 1]), num_rows=2)
        _, metrics = preference.orpo(out, torch.ones(2), odds_coef=1.0)
        exact = x - math.log(-math.expm1(x))
        assert metrics["chosen_reward"].item() == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_equal_policy_and_reference_give_log_2_and_no_margin():
    out, _, _ = outputs()
    sums = out.per_row(out.logprobs_N.detach().double())
    loss, metrics = preference.dpo(out, torch.ones_like(out.logprobs_N), ref_logprob=sums.float(), beta=0.1)
    assert loss.item() == pytest.approx(3 * math.log(2), rel=1e-6) and metrics["margin"].item() == 0.0
    assert metrics["accuracy"].item() == 0.0


def test_a_long_completion_is_summed_without_loss_of_digits():
    """100,000 tokens: a float32 running sum is off by whole units."""
    logprobs = -torch.rand(100_000) * 3
    out = TokenOutputs(logprobs, row_N=torch.tensor([0] * 50_000 + [1] * 50_000), num_rows=2)
    exact = [logprobs[:50_000].double().sum().item(), logprobs[50_000:].double().sum().item()]
    _, metrics = preference.dpo(out, torch.ones(100_000), ref_logprob=torch.tensor(exact), beta=1.0)
    assert abs(metrics["margin"].item()) < 0.02
