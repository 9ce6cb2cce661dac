"""How far a share that was counted may be from the true one."""

from __future__ import annotations

import math

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
