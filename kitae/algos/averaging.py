"""What one optimizer step averages over: row weights and the step's denominator.

Computed over all rows of the step before they are cut into forward passes, and summed over ranks by the
Learner, so neither changes the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from kitae.types import Row

Average = Literal["token", "sequence", "constant"]


def weigh(rows: Sequence[Row], how: Average, *, max_tokens: int = 0) -> tuple[list[Row], float]:
    """Return the rows with their weights set, and this rank's share of the step's denominator.

    "token" weighs every taught token alike (SFT; DAPO, arXiv:2503.14476 eq. 8); "sequence" weighs every row
    alike (GRPO as published, arXiv:2402.03300 eq. 3); "constant" divides by rows x max_tokens
    (Dr. GRPO, arXiv:2503.20783). A row without a taught token counts as a row in the last two.
    """
    if how == "token":
        return [replace(row, weight=1.0) for row in rows], float(sum(row.num_taught for row in rows))
    if how == "sequence":
        return [replace(row, weight=1.0 / max(row.num_taught, 1)) for row in rows], float(len(rows))
    assert max_tokens > 0, "constant averaging needs max_tokens"
    return [replace(row, weight=1.0) for row in rows], float(len(rows) * max_tokens)
