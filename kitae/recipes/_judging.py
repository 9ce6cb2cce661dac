"""Judging as recipes use it: whole groups at once, or each completion as soon as it is sampled.

    engine --on_rollout--> Judging.see --> reward workers, while the engine samples the rest --> Judging.scores

Functions are judged in processes of their own, so they start at once. A reward model shares its cores or its device with
the sampler, and its batches are those of the whole round: it scores when everything is sampled.
"""

from __future__ import annotations

from typing import Any

from kitae.recipes._rewards import Rewards
from kitae.recipes._sampling import Groups, Scores
from kitae.rewards.math import final_answer, is_usable
from kitae.rewards.pool import RewardPool
from kitae.types import Rollout


class Judge:
    """Scores rollouts by the run's reward or rewards."""

    def __init__(self, rewards: RewardPool | Rewards) -> None:
        self._rewards = rewards

    def score(self, groups: Groups) -> Scores:
        """A score per rollout, grouped alike."""
        scores = iter(self._rewards.score([(r.text, r.problem) for group in groups for r in group]))
        return [[next(scores) for _ in group] for group in groups]

    def begin(self) -> Judging:
        """The judging of groups that are still to be sampled."""
        return Judging(self._rewards)

    def num_right(self, groups: Groups) -> int:
        """How many completions hold the gold answer, wherever they hold it; as `kitae evaluate` counts."""
        found = [(final_answer(r.text)[0], r.problem.answer) for group in groups for r in group]
        pairs = [(answer, gold) for answer, gold in found if answer is not None and is_usable(gold)]
        return sum(verdict.value == 1.0 for verdict in self._rewards.compare(pairs))


class Judging:
    """The judging of one round; scores and errors are those of judging it when all of it is sampled."""

    def __init__(self, rewards: RewardPool | Rewards) -> None:
        self._rewards: Any = rewards  # what one of them has begun, the same one finishes
        self._begun: dict[tuple[int, int], Any] = {}

    def see(self, place: int, sample: int, rollout: Rollout) -> None:
        """An engine's on_rollout: begin to judge a completion of the problem at `place`."""
        self._begun[place, sample] = self._rewards.begin((rollout.text, rollout.problem))

    def scores(self, groups: Groups) -> Scores:
        """Wait for the scores of all rollouts, which were seen in any order; grouped alike."""
        where = [(place, sample) for place, group in enumerate(groups) for sample in range(len(group))]
        items = [(groups[place][sample].text, groups[place][sample].problem) for place, sample in where]
        scores = iter(self._rewards.finish(items, [self._begun[at] for at in where]))
        return [[next(scores) for _ in group] for group in groups]
