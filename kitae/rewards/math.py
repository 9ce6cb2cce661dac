"""Whether two answers mean the same mathematics, and where in a text the answer is.

    text --final_answer--> answer --normalise--> numbers or words --else math-verify--> equal or not

The reward `math` is 1 for a right final answer and 0 for a wrong one. Symbolic comparison of a hostile answer can
take for ever, so outside a worker of kitae/rewards/pool.py call `equivalent` only on text you trust.
"""

from __future__ import annotations

import re
from typing import TypeGuard

from kitae.rewards.normal import (
    as_number,
    assigned_value,
    is_relation,
    is_words,
    normalise,
    split_list,
    split_unit,
    strip_brackets,
    same_unit,
)
from kitae.types import Score

MAX_ANSWER = 2000
"""Longer answers are wrong without being read."""

OUT_OF_BUDGET = 0.0
"""What a completion earns whose answer exhausts its time."""
