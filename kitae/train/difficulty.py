"""How hard each problem is for the policy: its attempts, mean reward and right completions, over the whole run.

Every rank holds the same numbers. They are part of every checkpoint, and difficulty.jsonl shows them after each round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kitae.train.files import disk_errors, write_atomic

SETTLED_BELOW, SETTLED_ABOVE = 0.1, 0.9
"""A pass rate outside says: as good as never right, or as good as always. Such a problem rarely teaches anything."""
PASSED_OVER = 3
"""So many times in a row a settled problem is passed over before it is tried again."""


@dataclass(slots=True)
class Standing:
    """What is known of one problem."""

    attempts: int = 0
    """Completions sampled of it."""
    scored: int = 0
    """Of these, completions that could be scored."""
    reward_sum: float = 0.0
    right: int = 0
    """Scored completions whose reward was at least that of a right answer."""
    last_step: int = 0
    passed_over: int = 0
    """How often the curriculum has left it out since it was last sampled."""

    @property
    def pass_rate(self) -> float | None:
        return self.right / self.scored if self.scored else None

    @property
    def is_settled(self) -> bool:
        """Whether almost all or almost none of its completions were right so far."""
        rate = self.pass_rate
        return rate is not None and not SETTLED_BELOW <= rate <= SETTLED_ABOVE


class Difficulty:
    """Standings by Problem.index."""

    def __init__(self, *, right_from: float) -> None:
        """`right_from` is the reward of a right answer: 10 for the reasoning reward, 1 for any other."""
        self._right_from = right_from
        self._standings: dict[int, Standing] = {}

    def see(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Count a round: the records of samples.jsonl (problem, reward) of all ranks, on every rank."""
        for record in records:
            standing = self._standings.setdefault(record["problem"], Standing())
            standing.attempts += 1
            standing.last_step, standing.passed_over = step, 0
            if record["reward"] is not None:
                standing.scored += 1
                standing.reward_sum += record["reward"]
                # Of several rewards the first is the main one, and it says what is right.
                main = next(iter(record.get("rewards", {}).values()), record["reward"])
                standing.right += main >= self._right_from

    def of(self, index: int) -> Standing:
        """What is known of a problem, nothing if it was never sampled."""
        return self._standings.get(index, Standing())

    def is_passed_over(self, index: int) -> bool:
        """Whether the curriculum leaves the problem out this time: three times of four while it is settled."""
        standing = self.of(index)
        return standing.is_settled and standing.passed_over < PASSED_OVER

    def pass_over(self, index: int) -> None:
        """Note that it was left out."""
        self._standings[index].passed_over += 1

    def write(self, path: Path) -> None:
        """One line per problem sampled so far, by its number in the data."""
        lines = []
        for index, s in sorted(self._standings.items()):
            rates = {"reward": s.reward_sum / s.scored if s.scored else None, "pass_rate": s.pass_rate}
            counts = {"attempts": s.attempts, "scored": s.scored, "right": s.right, "last_step": s.last_step}
            lines.append(json.dumps({"problem": index, **counts, **rates}) + "\n")
        with disk_errors(path):
            write_atomic(path, "".join(lines).encode(), is_durable=False)

    def state(self) -> dict[str, Any]:
        return {"standings": [[index, asdict(s)] for index, s in self._standings.items()]}

    def load_state(self, state: dict[str, Any]) -> None:
        self._standings = {index: Standing(**values) for index, values in state["standings"]}
