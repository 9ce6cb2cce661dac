"""Sampling as recipes use it: groups of rollouts, what scores their tokens, and what a round amounted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from kitae.algos.advantages import is_dead
from kitae.config import RolloutSettings, SamplingSettings
from kitae.data.collate import empty_batch, with_stream
from kitae.models.policy import Policy
from kitae.parallel.world import World
from kitae.rewards import reasoning
from kitae.rewards.pool import EXHAUSTED
from kitae.rollout.base import OnRollout, RolloutEngine
from kitae.train.learner import Learner
from kitae.types import Batch, Problem, Rollout, Row, Score, WeighedScore

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


def summarise(groups: Groups, scores: Scores, *, world: World, is_reasoning: bool) -> dict[str, float]:
    """What the rollouts of all ranks amounted to, as means; the same on every rank.

    format_rate and accuracy are only known for the reasoning reward, whose own values say both.
    """
    flat = [
        (r, s) for group, own in zip(groups, scores, strict=True) for r, s in zip(group, own, strict=True)
    ]
    values = [s.value for _, s in flat if s.value is not None]
    own = [s.main for _, s in flat if s.main is not None]
    dead = is_dead(rewards_of(scores, num_generations=len(groups[0]))) if groups else torch.zeros(0)
    counts = {
        "completions": len(flat),
        "scored": len(values),
        "groups": len(groups),
        "tokens": sum(len(r.token_ids) for r, _ in flat),
        "reward": sum(values),
        "squared": sum(v * v for v in values),
        "judged": len(own),
        "right_form": sum(v >= reasoning.RIGHT_FORM for v in own),
        "right": sum(v == reasoning.RIGHT_ANSWER for v in own),
        "truncated": sum(r.finish_reason == "length" for r, _ in flat),
        "timeouts": sum(s.reason in EXHAUSTED for _, s in flat),
        "dead": int(dead.sum()),
        "surprise": -sum(sum(r.logprobs) for r, _ in flat),
    }
    totals = world.sum(torch.tensor(list(counts.values()), dtype=torch.float64, device=world.device)).tolist()
    n = dict(zip(counts, totals, strict=True))
    completions, scored = max(n["completions"], 1), max(n["scored"], 1)
    mean = n["reward"] / scored
    found = {
        "reward": mean,
        "reward_std": math.sqrt(max(n["squared"] / scored - mean * mean, 0.0)),
        "completion_length": n["tokens"] / completions,
        "truncated": n["truncated"] / completions,
        "unscored": 1 - n["scored"] / completions,
        "timeouts": n["timeouts"] / completions,
        "dead_groups": n["dead"] / max(n["groups"], 1),
        "entropy": n["surprise"] / max(n["tokens"], 1),
    }
    if is_reasoning:
        judged = max(n["judged"], 1)
        found |= {"format_rate": n["right_form"] / judged, "accuracy": n["right"] / judged}
    return found


def sample_records(groups: Groups, scores: Scores) -> list[dict[str, Any]]:
    """One JSON record per completion, for samples.jsonl."""
    return [
        {
            "problem": r.problem.index,
            "sample": number,
            "prompt": r.problem.prompt,
            "completion": r.text,
            "answer": r.problem.answer,
            "reward": s.value,
            "reason": s.reason,
            **({"rewards": s.parts} if isinstance(s, WeighedScore) else {}),
            "tokens": len(r.token_ids),
            "finish_reason": r.finish_reason,
        }
        for group, own in zip(groups, scores, strict=True)
        for number, (r, s) in enumerate(zip(group, own, strict=True))
    ]
