"""Each statistic against a slow version or a published value."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitae.algos.intervals import Z95, wilson
from kitae.evaluate.stats import bootstrap_mean, exact_mcnemar, pass_at_k


@given(st.integers(1, 2000), st.data())
def test_wilson_bounds_are_where_the_score_test_just_rejects(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials + 1e-12 and successes / trials - 1e-12 <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            # The definition that the formula solves: |p - bound| = z sqrt(bound (1 - bound) / n).
            sigma = math.sqrt(bound * (1 - bound) / trials)
            assert abs(successes / trials - bound) == pytest.approx(Z95 * sigma, rel=1e-6, abs=1e-7)


def test_wilson_has_its_known_values():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(n, data):
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    samples = [i < right for i in range(n)]
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(st.integers(0, 8), st.integers(0, 8))
def test_mcnemar_counts_the_coin_tosses_that_are_as_uneven(only_first, only_second):
    n = only_first + only_second
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=n)] if n <= 12 else None
    if tosses is None:
        return
    uneven = sum(abs(2 * heads - n) >= abs(only_first - only_second) for heads in tosses)
    assert exact_mcnemar(only_first, only_second) == pytest.approx(float(Fraction(uneven, 2**n)))


def test_mcnemar_works_for_thousands_of_items():
    assert exact_mcnemar(1000, 1000) == 1.0
    assert exact_mcnemar(0, 2000) < 1e-300
    assert exact_mcnemar(0, 0) == 1.0


def test_bootstrap_agrees_with_the_normal_interval_and_repeats_itself():
    values = [1.0] * 60 + [0.0] * 120 + [-1.0] * 20
    low, high = bootstrap_mean(values, seed=3)
    mean = sum(values) / len(values)
    sigma = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) / len(values))
    assert (low, high) == pytest.approx((mean - Z95 * sigma, mean + Z95 * sigma), abs=0.015)
    assert bootstrap_mean(values, seed=3) == (low, high)
    assert bootstrap_mean([0.25] * 5) == (0.25, 0.25)
