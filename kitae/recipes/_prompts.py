"""Which prompts a round samples: the loader's, but for those that are replaced by spare ones.

    loader --curriculum: settled problems leave--> prompts --sampled, judged--> groups --refill: dead ones leave--> groups

Spare prompts come in an order of their own, the same on every rank, and none that the round has seen already. A round has
numbered places; place i of the round is place i // ranks of rank i % ranks, so what is drawn does not depend on ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kitae.algos.advantages import is_dead
from kitae.data.loader import Loader
from kitae.parallel.world import World
from kitae.recipes._sampling import Groups, Scores, rewards_of
from kitae.train.difficulty import Difficulty
from kitae.types import Problem

Attempt = Callable[[list[Problem]], tuple[Groups, Scores]]
"""Samples a group of each problem and judges it."""
LOOKS_PER_PLACE = 16
"""So many spare prompts are looked at for each place before it keeps what it has."""


class Round(NamedTuple):
    """The groups of this rank that a round trains on, those that left it, and how many they were on all ranks."""

    groups: Groups
    scores: Scores
    left_groups: Groups
    left_scores: Scores
    metrics: dict[str, float]

    @property
    def everything(self) -> tuple[Groups, Scores]:
        """All that was sampled."""
        return self.groups + self.left_groups, self.scores + self.left_scores

    def dead_places(self) -> list[int]:
        """Which groups teach nothing, by the rewards as they were given."""
        if not self.groups:
            return []
        dead_P = is_dead(rewards_of(self.scores, num_generations=len(self.groups[0])))
        return [int(place) for place in dead_P.nonzero()]


class Prompts:
    """Deals the prompts of each round to the ranks; every rank calls its methods together."""

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        loader: Loader[Problem],
        spares: Loader[int],
        world: World,
        curriculum: Difficulty | None,
        refill_passes: int,
    ) -> None:
        """`spares` walks through the numbers of `problems` one at a time; with `curriculum`, settled ones leave."""
        self._problems, self._loader, self._spares = problems, loader, spares
        self._world, self._curriculum, self._passes = world, curriculum, refill_passes
        self._seen: set[int] = set()

    @property
    def rounds_per_epoch(self) -> int:
        return self._loader.steps_per_epoch

    def take(self) -> list[Problem]:
        """This rank's prompts of the next round."""
        mine = self._loader.take()
        self._seen = {index for own in self._world.gather_json([p.index for p in mine]) for index in own}
        if self._curriculum is None:
            return mine
        settled = [i for i, problem in enumerate(mine) if self._curriculum.is_passed_over(problem.index)]
        found = self._replace(settled)
        for own in self._world.gather_json([mine[i].index for i in found]):
            for index in own:
                self._curriculum.pass_over(index)
        return [found.get(i, problem) for i, problem in enumerate(mine)]

    def round(self, attempt: Attempt) -> Round:
        """Take prompts and sample and judge them; then replace dead groups, as often as the settings allow.

        Dynamic sampling of arXiv:2503.14476, section 3.2, within a budget of passes. What is dead after the last one stays.
        """
        groups, scores = attempt(self.take())
        done = Round(groups, scores, [], [], {})
        if not self._passes:
            return done
        refilled = 0
        for _ in range(self._passes):
            found = self._replace(done.dead_places())
            drawn = sum(self._world.gather_json(len(found)))
            if not drawn:
                break
            refilled += drawn
            places = sorted(found)
            for place, group, own in zip(places, *attempt([found[p] for p in places]), strict=True):
                done.left_groups.append(groups[place])
                done.left_scores.append(scores[place])
                groups[place], scores[place] = group, own
        counts = self._world.gather_json([len(done.dead_places()), len(groups)])
        dead, total = (sum(column) for column in zip(*counts, strict=True))
        done.metrics["rollout/refilled_groups"] = float(refilled)
        done.metrics["rollout/dead_after_refill"] = dead / max(total, 1)
        return done

    def _replace(self, places: list[int]) -> dict[int, Problem]:
        """Spare prompts for these places of this rank; fewer where the data has no others."""
        ranks = self._world.world_size
        wanted = sorted(
            place * ranks + rank for rank, own in enumerate(self._world.gather_json(places)) for place in own
        )
        return {
            place // ranks: problem
            for place, problem in zip(wanted, self._draw(len(wanted)), strict=False)
            if place % ranks == self._world.rank
        }

    def _draw(self, count: int) -> list[Problem]:
        """At most `count` prompts that the round has not seen and the curriculum does not leave out."""
        drawn: list[Problem] = []
        for _ in range(min(len(self._problems), LOOKS_PER_PLACE * count)):
            if len(drawn) == count:
                break
            (number,) = self._spares.take()
            problem = self._problems[number]
            if problem.index in self._seen:
                continue
            self._seen.add(problem.index)
            if self._curriculum is not None and self._curriculum.is_passed_over(problem.index):
                self._curriculum.pass_over(problem.index)
            else:
                drawn.append(problem)
        return drawn
