"""Rejection sampling: a teacher answers problems several times, a reward judges, the right answers become SFT rows.

    problems --ask_engine or ask_endpoint--> answers with scores --Asked--> asked.jsonl --rejection.select--> rows.jsonl

Every answer is on the disk as soon as it is judged, so that nothing is asked twice; what is kept of them is decided at
the end, from the file alone, and can be decided anew without asking. Cf. arXiv:2501.12948, section 2.3.3.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from kitae.config import SamplingSettings
from kitae.evaluate.answers import Answer
from kitae.rewards.base import Rewarder
from kitae.rewards.reasoning import RIGHT_ANSWER
from kitae.rollout.choose import LocalEngine
from kitae.rollout.http import HttpEngine, RequestRefused
from kitae.types import Problem, Rollout, Score

OnAnswers = Callable[[list[Answer]], None]


def ask_engine(
    engine: LocalEngine,
    problems: Sequence[Problem],
    *,
    n: int,
    sampling: SamplingSettings,
    seed: int,
    pool: Rewarder,
    on_answers: OnAnswers,
    on_token: Callable[[], None],
    problems_at_once: int,
) -> None:
    """Ask a local model; `on_answers` gets all n answers to a problem at once, as soon as they are there.

    What is answered depends on neither problems_at_once nor on which problems were asked before.
    """
    for start in range(0, len(problems), problems_at_once):
        chunk = problems[start : start + problems_at_once]
        groups = _Groups(n=n, pool=pool, on_answers=on_answers)

        def on_tokens(_place: int, _sample: int, ids: list[int]) -> None:
            for _ in ids:
                on_token()

        try:
            engine.generate(
                chunk, n=n, sampling=sampling, seed=seed, on_tokens=on_tokens, on_rollout=groups.add
            )
        finally:  # also when a signal ends it: what is answered stays answered
            groups.settle()


class _Groups:
    """Collects completions as they end. A group that is complete is judged while the others go on."""

    def __init__(self, *, n: int, pool: Rewarder, on_answers: OnAnswers) -> None:
        self._n, self._pool, self._on_answers = n, pool, on_answers
        self._groups: dict[int, dict[int, Rollout]] = {}
        self._judged: tuple[list[Rollout], Iterator[Score]] | None = None

    def add(self, place: int, sample: int, rollout: Rollout) -> None:
        group = self._groups.setdefault(place, {})
        group[sample] = rollout
        if len(group) == self._n:
            del self._groups[place]
            self._judge([group[sample] for sample in range(self._n)])

    def _judge(self, rollouts: list[Rollout]) -> None:
        """Hand the group to the reward's processes, and take what they say of the group before."""
        scores = self._pool.score_iter([(r.text, r.problem) for r in rollouts])
        self.settle()
        self._judged = rollouts, scores

    def settle(self) -> None:
        if self._judged is not None:
            rollouts, scores = self._judged
            self._judged = None
            judged = zip(rollouts, scores, strict=True)
            name = self._pool.settings.function
            self._on_answers(
                [answer_of(r, score, sample=s, function=name) for s, (r, score) in enumerate(judged)]
            )


def ask_endpoint(
    engine: HttpEngine,
    wanted: Iterable[tuple[Problem, int]],
    *,
    sampling: SamplingSettings,
    seed: int,
    pool: Rewarder,
    on_answers: OnAnswers,
    skips_refused: bool,
) -> None:
    """Ask an endpoint for (problem, number of the answer); `on_answers` gets each as soon as it is judged.

    `skips_refused`: a request that the server does not take counts as an empty answer that could not be scored.
    """
    judged: deque[Answer] = deque()

    def ask(item: tuple[Problem, int]) -> None:
        problem, sample = item
        try:
            rollout = engine.ask(problem, sample, sampling=sampling, seed=seed)
        except RequestRefused as error:
            if not skips_refused:
                raise
            nothing = Rollout(problem=problem, text="", token_ids=[], logprobs=[], finish_reason="length")
            refused = Score(None, f"refused: {error}")
            judged.append(answer_of(nothing, refused, sample=sample, function=pool.settings.function))
            return
        [score] = pool.score([(rollout.text, problem)])
        judged.append(answer_of(rollout, score, sample=sample, function=pool.settings.function))

    def take() -> None:
        found = list(judged)
        on_answers(found)
        for _ in found:  # after they are written: a signal may strike at any instant
            judged.popleft()

    try:
        for _ in engine.each(wanted, ask):
            take()
    finally:  # also when a signal ends it: what is answered stays answered
        take()


def answer_of(rollout: Rollout, score: Score, *, sample: int, function: str) -> Answer:
    """What is kept of a rollout judged by the reward `function`."""
    return {
        "problem": rollout.problem.index,
        "sample": sample,
        "prompt": rollout.problem.prompt,
        "completion": rollout.text,
        "answer": rollout.problem.answer,
        "reward": score.value,
        "reason": score.reason,
        "label": None if score.value is None else score.value >= right_reward(function),
        "num_tokens": rollout.num_tokens,
        "finish_reason": rollout.finish_reason,
        "time": round(time.time(), 3),
    }


def right_reward(function: str) -> float:
    """The reward of a right answer: 10 for the reasoning reward, 1 for any other."""
    return RIGHT_ANSWER if function == "reasoning" else 1.0
