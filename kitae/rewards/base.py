"""What judges completions, whether in worker processes (pool.py) or with a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from kitae.config import RewardSettings
from kitae.types import Problem, Score


class Rewarder(Protocol):
    """Scores completions, each with its prefill, and the problem it answers."""

    settings: RewardSettings

    def score(self, items: Sequence[tuple[str, Problem]]) -> list[Score]:
        """The scores of all items, in their order."""
        ...

    def score_iter(self, items: Sequence[tuple[str, Problem]]) -> Iterator[Score]:
        """The same one by one, as they become known."""
        ...

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Whether each answer is mathematically its gold answer, 1 or 0."""
        ...
