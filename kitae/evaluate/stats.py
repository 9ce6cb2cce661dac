"""The statistics of an evaluation, each a formula with its source."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


def wilson(successes: float, trials: int, *, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a share, 95 % by default. Example: 8 of 10 -> (0.490, 0.943).

    E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209; unlike p +- z sigma it stays within [0, 1] and is of use at 0 and 1.
    """
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    middle = share + z * z / (2 * trials)
    scale = 1 + z * z / trials
    # The ends are exact where rounding would leave 1e-17.
    low = (middle - spread) / scale if share > 0 else 0.0
    high = (middle + spread) / scale if share < 1 else 1.0
    return low, high


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
