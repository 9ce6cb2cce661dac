"""The rollouts of one round that still wait for their optimizer steps; part of every checkpoint.

A round's rows are cut into `updates` slices of whole groups, and passed over `epochs` times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kitae.types import Row


class RolloutBuffer:
    """Hands out a round's groups slice by slice; its state is plain JSON, floats round-trip exactly."""

    def __init__(self, *, updates: int, epochs: int) -> None:
        self.updates, self.epochs = updates, epochs
        self.steps_per_round = updates * epochs
        self.position = self.steps_per_round
        self.temperature = 1.0
        self.groups: list[list[Row]] = []

    @property
    def is_used_up(self) -> bool:
        return self.position >= self.steps_per_round

    def fill(self, groups: Sequence[Sequence[Row]], *, temperature: float) -> None:
        """Take a new round: the rows of each group, and the temperature they were sampled at."""
        assert self.is_used_up, "a round was sampled before the last one was used up"
        self.groups = [list(group) for group in groups]
        self.temperature = temperature
        self.position = 0

    def take(self) -> list[Row]:
        """The rows of the next optimizer step; slices differ by at most one group."""
        assert not self.is_used_up, "the round is used up"
        part = self.position % self.updates
        self.position += 1
        first, last = (len(self.groups) * k // self.updates for k in (part, part + 1))
        return [row for group in self.groups[first:last] for row in group]

    def state(self) -> dict[str, Any]:
        """What is still to be trained on; a used-up round is not kept."""
        groups = [] if self.is_used_up else [[asdict(row) for row in group] for group in self.groups]
        return {"position": self.position, "temperature": self.temperature, "groups": groups}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on in the middle of a round."""
        self.position, self.temperature = state["position"], state["temperature"]
        self.groups = [[Row(**row) for row in group] for group in state["groups"]]
