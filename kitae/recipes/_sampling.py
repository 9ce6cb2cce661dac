"""Sampling as recipes use it: groups of rollouts from the present weights, and their rewards as a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kitae.config import RolloutSampling, RolloutSettings
from kitae.rollout.base import OnRollout, RolloutEngine
from kitae.train.learner import Learner
from kitae.types import Problem, Rollout, Score

Groups = list[list[Rollout]]
Scores = list[list[Score]]


class Sampler:
    """Samples from a learner's present weights under a recipe's rollout settings."""

    def __init__(
        self, engine: RolloutEngine, *, learner: Learner, rollout: RolloutSettings, seed: int
    ) -> None:
        self.engine, self._learner, self._rollout, self._seed = engine, learner, rollout, seed

    def sample(
        self,
        problems: Sequence[Problem],
        *,
        n: int,
        temperature: float,
        step: int,
        on_rollout: OnRollout | None = None,
    ) -> Groups:
        """`n` completions of each problem; what is drawn depends on seed, step, problem and number only."""
        drawing = self.drawing(temperature=temperature, step=step)
        with self.present_weights():
            return self.engine.generate(problems, n=n, on_rollout=on_rollout, **drawing)

    def drawing(self, *, temperature: float, step: int) -> dict[str, Any]:
        """How the completions of a step are drawn, as arguments of RolloutEngine.generate."""
        rollout = self._rollout
        sampling = RolloutSampling(
            temperature=temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            max_new_tokens=rollout.max_new_tokens,
            stop=rollout.stop,
        )
        return {"sampling": sampling, "seed": self._seed * 1_000_003 + step}

    def greedy(self, problems: Sequence[Problem], *, on_rollout: OnRollout | None = None) -> Groups:
        """The likeliest completion of each problem, as groups of one."""
        rollout = self._rollout
        sampling = RolloutSampling(temperature=0.0, max_new_tokens=rollout.max_new_tokens, stop=rollout.stop)
        with self.present_weights():
            return self.engine.generate(
                problems, n=1, sampling=sampling, seed=self._seed, on_rollout=on_rollout
            )

    @contextmanager
    def present_weights(self) -> Iterator[None]:
        """Inside it the engine has the learner's present weights, whole on every rank."""
        with self._learner.unsharded():
            self.engine.sync()
            yield


def rewards_of(scores: Scores, *, num_generations: int) -> torch.Tensor:
    """Rewards [P, G]; NaN marks a completion that could not be scored."""
    values = [math.nan if s.value is None else s.value for group in scores for s in group]
    return torch.tensor(values, dtype=torch.float32).view(-1, num_generations)
