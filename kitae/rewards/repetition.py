"""A penalty for saying the same again: 0 where no run of four words occurs twice, towards -1 where all is repetition.

A part of a sum: reward.extra = {repetition = 0.2}. Repetition penalties by n-grams: arXiv:2502.03373, sec. 4.2.
"""

from __future__ import annotations

import re
from typing import Any

from kitae.types import Score

WORDS_PER_RUN = 4
WORD = re.compile("[\\u3040-\\u30ff\\u3400-\\u9fff]|[^\\W\\d_\\u3040-\\u30ff\\u3400-\\u9fff]+|\\d+|\\S")
"""A Japanese or Chinese character, which no blank parts from the next, a word of other letters, a number, or a sign."""


def reward(completion: str, *, prompt: str, answer: str | None, **columns: Any) -> Score:
    """Minus the share of four-word runs that occurred before in the completion. Example: "a b c d a b c d" -> -0.2."""
    words = [word.lower() for word in WORD.findall(completion)]
    runs = [tuple(words[i : i + WORDS_PER_RUN]) for i in range(len(words) - WORDS_PER_RUN + 1)]
    repeated = len(runs) - len(set(runs))
    return Score(-repeated / max(len(runs), 1), f"{repeated} of {len(runs)} runs of words occurred before")
