"""rollout.rounds_ahead: the next round is sampled, and judged, while this one trains.

    weights --begin--> round k + 1, in a thread;  round k -> updates;  then k + 1 -> updates of newer weights, corrected

A round that trains was sampled by the weights from before the last round's updates, and the first one by the run's start.
What corrects for that is grpo.is_cap: the ratio's clip stays around the policy as it is before the round's own updates, and
each token is weighed by min(that policy's probability over the sampler's, is_cap): the decoupled objective of
arXiv:2110.00641, used for asynchronous rollouts by arXiv:2505.24298.

A checkpoint waits for the round that is under way and keeps its completions. So a resumed run trains on the very same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kitae.errors import CheckpointError
from kitae.recipes._judging import Judge, Judging
from kitae.recipes._prompts import Prompts, Round
from kitae.recipes._sampling import Groups, Sampler
from kitae.rollout.background import BackgroundEngine
from kitae.types import Problem, Rollout

if TYPE_CHECKING:
    from kitae.recipes._setup import Setup

SAVED = ("text", "token_ids", "logprobs", "kept_ids", "finish_reason")
"""What a checkpoint keeps of a rollout, beside its problem's index."""


@dataclass(frozen=True, kw_only=True)
class _UnderWay:
    """A round that is being sampled and judged."""

    rollouts: Future[Groups]
    judging: Judging
    weights_of: int
    """The optimizer step whose weights sample it: how many were taken before."""


def open_ahead(
    setup: Setup,
    prompts: Prompts,
    problems: Sequence[Problem],
    sampler: Sampler,
    judge: Judge,
    *,
    temperature_at: Callable[[int], float],
    total: int,
) -> Ahead | None:
    """What samples the rounds of a run of `total` steps one ahead; None where rollout.rounds_ahead is 0."""
    rollout = setup.cfg.rollout
    if not rollout.rounds_ahead:
        return None
    ahead = Ahead(
        prompts,
        problems=problems,
        sampler=sampler,
        judge=judge,
        num_generations=rollout.num_generations,
        temperature_at=temperature_at,
        round_starts=range(1, total + 1, rollout.updates_per_round * rollout.epochs_per_round),
        timer=setup.timer,
    )
    setup.run.track("ahead", ahead)
    return ahead


class Ahead:
    """Samples rounds one ahead; part of every checkpoint. Every rank calls its methods together."""

    def __init__(
        self,
        prompts: Prompts,
        *,
        problems: Sequence[Problem],
        sampler: Sampler,
        judge: Judge,
        num_generations: int,
        temperature_at: Callable[[int], float],
        round_starts: range,
        timer: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """`round_starts` are the steps at which the run's rounds begin, `problems` what `prompts` deals."""
        self._prompts, self._problems, self._sampler, self._judge = prompts, problems, sampler, judge
        self._num_generations, self._temperature_at = num_generations, temperature_at
        self._round_starts, self._timer = round_starts, timer
        self._under_way: _UnderWay | None = None

    def round(self, step: int) -> Round:
        """The round that trains from `step` on, which is one of `round_starts`. The one after it is begun."""
        this = self._under_way or self._begin(step, now=step)
        with self._timer("rollout"):
            groups = this.rollouts.result()
        with self._timer("reward"):
            scores = this.judging.scores(groups)
        self._under_way = None
        following = step + self._round_starts.step
        if following in self._round_starts:
            self._under_way = self._begin(following, now=step)
        return Round(groups, scores, [], [], {"rollout/staleness": float(step - 1 - this.weights_of)})

    def _begin(self, step: int, *, now: int) -> _UnderWay:
        """Sample the round that starts at `step`, with the weights of step `now`."""
        problems = self._prompts.take()
        engine, judging = self._sampler.engine, self._judge.begin()
        assert isinstance(engine, BackgroundEngine), engine
        drawing = self._sampler.drawing(temperature=self._temperature_at(step), step=step)
        with self._sampler.present_weights():
            rollouts = engine.begin(problems, n=self._num_generations, on_rollout=judging.see, **drawing)
        return _UnderWay(rollouts=rollouts, judging=judging, weights_of=now - 1)

    def state(self) -> dict[str, Any]:
        """The completions of the round under way, once all are there. They are judged again: a score may be anything."""
        this = self._under_way
        if this is None:
            return {"weights_of": None, "groups": []}
        groups = [
            [{"problem": r.problem.index, **{name: getattr(r, name) for name in SAVED}} for r in group]
            for group in this.rollouts.result()
        ]
        return {"weights_of": this.weights_of, "groups": groups}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with the round that was under way."""
        if state["weights_of"] is None:
            return
        problems = self._by_index({saved["problem"] for group in state["groups"] for saved in group})
        groups = [
            [Rollout(**{**saved, "problem": problems[saved["problem"]]}) for saved in group]
            for group in state["groups"]
        ]
        rollouts: Future[Groups] = Future()
        rollouts.set_result(groups)
        judging = self._judge.begin()
        for place, group in enumerate(groups):
            for sample, rollout in enumerate(group):
                judging.see(place, sample, rollout)
        self._under_way = _UnderWay(rollouts=rollouts, judging=judging, weights_of=state["weights_of"])

    def _by_index(self, wanted: set[int]) -> dict[int, Problem]:
        found: dict[int, Problem] = {}
        for problem in self._problems:
            if len(found) == len(wanted):
                break
            if problem.index in wanted:
                found[problem.index] = problem
        if missing := sorted(wanted - set(found)):
            raise CheckpointError(
                f"the checkpoint holds completions of rows {missing[:5]} of the data, which are not there any more; go on "
                "with the data it was made with (data.train, rollout.max_prompt_length)"
            )
        return found
