"""Which prompts a round samples: the loader's, but for those that are replaced by spare ones.

    loader --curriculum: settled problems leave--> prompts --sampled, judged--> groups --refill: dead ones leave--> groups

Spare prompts come in an order of their own, the same on every rank, and none that the round has seen already. A round has
numbered places; place i of the round is place i // ranks of rank i % ranks, so what is drawn does not depend on ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    ) -> None:
        """`spares` walks through the numbers of `problems` one at a time; with `curriculum`, settled ones leave."""
        self._problems, self._loader, self._spares = problems, loader, spares
        self._world, self._curriculum = world, curriculum
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

    def refill(
        self, groups: Groups, scores: Scores, *, passes: int, attempt: Attempt
    ) -> tuple[Groups, Scores, dict[str, float]]:
        """Replace dead groups by groups of spare prompts, dead ones among these too, in at most so many passes.

        Dynamic sampling of arXiv:2503.14476, section 3.2, within a budget. The groups that were replaced follow behind the
        round's own, which are as many as before. Metrics: refilled_groups, and refill_dead (share of dead ones left).
        """
        groups, scores = list(groups), list(scores)
        out: tuple[Groups, Scores] = ([], [])
        refilled = 0
        for _ in range(passes):
            found = self._replace(_dead_places(groups, scores))
            drawn = sum(self._world.gather_json(len(found)))
            if not drawn:
                break
            refilled += drawn
            places = sorted(found)
            new_groups, new_scores = attempt([found[i] for i in places])
            for i, group, own_scores in zip(places, new_groups, new_scores, strict=True):
                out[0].append(groups[i])
                out[1].append(scores[i])
                groups[i], scores[i] = group, own_scores
        counts = self._world.gather_json([len(_dead_places(groups, scores)), len(groups)])
        dead, total = (sum(column) for column in zip(*counts, strict=True))
        metrics = {"rollout/refilled_groups": float(refilled), "rollout/refill_dead": dead / max(total, 1)}
        return groups + out[0], scores + out[1], metrics

    def _replace(self, places: list[int]) -> dict[int, Problem]:
        """Spare prompts for these places of this rank; fewer where the data has no others."""
        ranks = self._world.world_size
        wanted = sorted(
            place * ranks + rank
            for rank, own in enumerate(self._world.gather_json(places))
            for place in own
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


def _dead_places(groups: Groups, scores: Scores) -> list[int]:
    if not groups:
        return []
    dead = is_dead(rewards_of(scores, num_generations=len(groups[0])))
    return [i for i, is_dead_group in enumerate(dead.tolist()) if is_dead_group]
