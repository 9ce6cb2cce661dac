"""The statistics of an evaluation, each a formula with its source."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    arXiv:2107.03374, eq. 1. Example: 1 right of 2, k = 1 -> 0.5.
    """
    assert 1 <= k <= num_samples and 0 <= num_correct <= num_samples, (num_samples, num_correct, k)
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def exact_mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p value that two models are equally good, from the items only one of them gets right.

    Under that hypothesis each such item is a fair coin: a binomial test with p = 1/2 (Q. McNemar, Psychometrika 12
    (1947) 153, in its exact form). Example: 1 and 6 -> 0.125.
    """
    trials = only_first + only_second
    tail = sum(math.comb(trials, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << trials))


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean over resampled items (B. Efron, Ann. Statist. 7 (1979) 1).

    Given one difference per item, this is the paired bootstrap.
    """
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [data[rng.integers(0, len(data), len(data))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
