"""Sampling as recipes use it: groups of rollouts, and what scores their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from kitae.config import RolloutSettings, SamplingSettings
from kitae.data.collate import empty_batch, with_stream
from kitae.models.policy import Policy
from kitae.parallel.world import World
from kitae.rollout.base import OnRollout, RolloutEngine
from kitae.train.learner import Learner
from kitae.types import Batch, Problem, Rollout, Row, Score

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
        sampling = SamplingSettings(
            temperature=temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            max_new_tokens=rollout.max_new_tokens,
        )
        return {"sampling": sampling, "seed": self._seed * 1_000_003 + step}

    def greedy(self, problems: Sequence[Problem], *, on_rollout: OnRollout | None = None) -> Groups:
        """The likeliest completion of each problem, as groups of one."""
        sampling = SamplingSettings(temperature=0.0, max_new_tokens=self._rollout.max_new_tokens)
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


class Scorer(Protocol):
    """Anything that scores batches."""

    def logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]: ...


class FrozenModel:
    """A second copy of a fully fine-tuned model, as it was before the run."""

    def __init__(self, policy: Policy, *, world: World) -> None:
        self._policy, self._world = policy.eval(), world

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Log-probabilities of each batch's predictions; ranks with fewer batches take part with empty ones."""
        missing = max(self._world.gather_json(len(batches))) - len(batches)
        return [self._policy(b).logprobs_N for b in [*batches, *[empty_batch()] * missing]][: len(batches)]


class Reference:
    """The frozen model that a KL term pulls towards, or any other that gives a round's tokens a stream of log-probs."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        collate: Callable[..., list[Batch]],
        stream: str = "ref_logprobs",
        renew: Callable[[], None] = lambda: None,
    ) -> None:
        """`collate(rows, temperature=...)` lays rows out as the training passes are."""
        self._scorer, self._collate, self._stream = scorer, collate, stream
        self.renew = renew
        """Lets the policy as it is now be the reference."""

    def annotate(self, groups: list[list[Row]], *, temperature: float) -> list[list[Row]]:
        """The groups with one more stream, scored at the temperature they were sampled at."""
        rows = [row for group in groups for row in group]
        batches = self._collate(rows, temperature=temperature)
        scored = iter(with_stream(rows, self._stream, batches, self._scorer.logprobs(batches)))
        return [[next(scored) for _ in group] for group in groups]


def rewards_of(scores: Scores, *, num_generations: int) -> torch.Tensor:
    """Rewards [P, G]; NaN marks a completion that could not be scored."""
    values = [math.nan if s.value is None else s.value for group in scores for s in group]
    return torch.tensor(values, dtype=torch.float32).view(-1, num_generations)
