"""The rewards of a run: functions in worker processes, reward models in this one, and their weighted sum.

    (completion, Problem) --each reward--> its Score --weights--> Score(sum, reason, parts)

A reward model's folder is scored here, in batches; a function by rewards/pool.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from kitae import backends
from kitae.config import DataSettings, ModelSettings, RewardSettings
from kitae.data.chat import Template
from kitae.data.collate import collate
from kitae.data.formats import RowError
from kitae.errors import ConfigError, ModelError
from kitae.models.critic import Critic, load_critic
from kitae.models.files import find_model
from kitae.models.load import load_tokenizer
from kitae.models.score import has_score
from kitae.parallel.world import World
from kitae.plugins import names_model, short_names
from kitae.recipes._reward_model import with_end
from kitae.rewards.pool import RewardPool
from kitae.train.memory import Passes
from kitae.types import Problem, Row, Score, WeighedScore

log = logging.getLogger(__name__)
Items = Sequence[tuple[str, Problem]]
ROWS_PER_FORWARD = 64


class Reward(Protocol):
    """Anything that scores completions, each with its prefill, and the problem it answers."""

    def score(self, items: Items) -> list[Score]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """One reward of several."""

    name: str
    """Short, as metrics have it."""
    weight: float
    reward: Reward


class Rewards:
    """Several rewards as one; use it as a context manager, or call `close`."""

    def __init__(self, parts: Sequence[Weighed], *, settings: RewardSettings) -> None:
        self.parts = list(parts)
        self.settings = settings
        self._comparer: RewardPool | None = None

    def score(self, items: Items) -> list[Score]:
        """The weighted sum per item; what any reward could not score has none. Single values are in `parts`."""
        return self.finish(items, [self.begin(item) for item in items])

    def begin(self, item: tuple[str, Problem]) -> dict[str, Future[Score]]:
        """Let the functions among the rewards judge an item as soon as their processes are free."""
        return {
            part.name: part.reward.begin(item) for part in self.parts if isinstance(part.reward, RewardPool)
        }

    def finish(self, items: Items, begun: Sequence[dict[str, Future[Score]]]) -> list[Score]:
        """The scores of `items`, begun one by one in any order; reward models score them all here, in batches."""
        assert len(items) == len(begun), (len(items), len(begun))
        if not items:
            return []
        try:
            found = [
                part.reward.finish(items, [own[part.name] for own in begun])
                if isinstance(part.reward, RewardPool)
                else part.reward.score(items)
                for part in self.parts
            ]
        finally:  # after an error of one of them
            for own in begun:
                for future in own.values():
                    future.cancel()
        return [self._sum(scores) for scores in zip(*found, strict=True)]

    def score_iter(self, items: Items) -> Iterator[Score]:
        """The same, for callers that take scores one by one."""
        return iter(self.score(items))

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Whether each answer is mathematically its gold answer, 1 or 0, as RewardPool.compare."""
        if not pairs:
            return []
        if self._comparer is None:
            pools = (part.reward for part in self.parts if isinstance(part.reward, RewardPool))
            self._comparer = next(pools, None) or RewardPool(of_one(self.settings, "math"))
        return self._comparer.compare(pairs)

    def close(self) -> None:
        for part in self.parts:
            part.reward.close()
        if self._comparer is not None and all(part.reward is not self._comparer for part in self.parts):
            self._comparer.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _sum(self, scores: Sequence[Score]) -> Score:
        named = list(zip(self.parts, scores, strict=True))
        values = {part.name: score.value for part, score in named}
        unscored = [f"{part.name}: {score.reason}" for part, score in named if score.value is None]
        if unscored:
            return WeighedScore(None, "; ".join(unscored), values)
        total = math.fsum(part.weight * score.value for part, score in named if score.value is not None)
        return WeighedScore(total, scores[0].reason, values)


class RewardModel:
    """A trained reward model as a reward. Every rank has all of it."""

    def __init__(self, critic: Critic, *, template: Template) -> None:
        self._critic = critic.eval()
        self._template = template
        self._passes = Passes(critic, World())
        config = critic.causal_lm.config.get_text_config()
        self.max_length: float = getattr(config, "max_position_embeddings", math.inf)
        """Longest prompt and completion it was built for, in tokens; what is longer cannot be scored."""

    @classmethod
    def load(
        cls, name: str, *, device: str = "auto", dtype: str = "auto", ranks: int = 1, setting: str = "reward"
    ) -> RewardModel:
        """A folder, run, adapter folder or hub id of a reward model; `setting` is where it was named, for errors."""
        # The settings' class checks device and dtype.
        model = ModelSettings.model_validate({"name_or_path": name, "device": device, "dtype": dtype})
        try:
            found = find_model(name)
        except ModelError as error:
            raise ModelError(f"{setting}: {error}") from error
        if not has_score(found):
            raise ConfigError(
                f"{setting} names {name}, a language model without a score; make a reward model of it with kitae train "
                "reward_model, and name that run's folder"
            )
        template = Template.load(load_tokenizer(model), data=DataSettings())
        own = cls(load_critic(model, trainable=False, ranks=ranks), template=template)
        log.info("%s: the reward model %s reads up to %s tokens", setting, name, own.max_length)
        return own

    @torch.no_grad()
    def score(self, items: Items) -> list[Score]:
        """The score after the end of turn of each completion, laid out by the reward model's own template."""
        laid = [self._lay_out(text, problem) for text, problem in items]
        rows = [row for row in laid if isinstance(row, Row)]
        backend = backends.of(self._critic.device)
        batches = collate(rows, rows_per_forward=ROWS_PER_FORWARD, max_tokens=backend.tokens_per_forward)
        values = [v for one in self._passes.run(batches, self._values) for v in one]
        given = iter(values)
        return [_checked(next(given)) if isinstance(row, Row) else row for row in laid]

    def close(self) -> None:
        """Nothing to end."""

    def _lay_out(self, text: str, problem: Problem) -> Row | Score:
        turns = problem.messages or [{"role": "user", "content": problem.prompt}]
        try:
            row = self._template.completed(turns, text)
        except RowError as error:
            return Score(None, f"the reward model's template: {error}")
        if len(row.token_ids) > self.max_length:
            return Score(None, f"{len(row.token_ids)} tokens, and the reward model reads {self.max_length}")
        return with_end(row)

    def _values(self, batch: object) -> list[float]:
        values_N = self._critic(batch).values_N
        found: list[float] = values_N.tolist()
        return found


def open_rewards(
    settings: RewardSettings, *, device: str = "auto", dtype: str = "auto", ranks: int = 1
) -> RewardPool | Rewards:
    """The rewards that the settings name; a single function is its pool alone, which scores without weights."""
    weights = {settings.function: settings.weight, **settings.extra}
    if len(weights) == 1 and settings.weight == 1.0 and not names_model(settings.function):
        return RewardPool(settings)
    parts: list[Weighed] = []
    try:
        for (name, weight), short in zip(weights.items(), short_names(weights), strict=True):
            reward: Reward
            if names_model(name):
                setting = "reward.function" if name == settings.function else "reward.extra"
                reward = RewardModel.load(name, device=device, dtype=dtype, ranks=ranks, setting=setting)
            else:
                reward = RewardPool(of_one(settings, name))
            parts.append(Weighed(name=short, weight=weight, reward=reward))
    except BaseException:
        for part in parts:
            part.reward.close()
        raise
    return Rewards(parts, settings=settings)


def of_one(settings: RewardSettings, name: str) -> RewardSettings:
    """The same settings for one function alone."""
    return settings.model_copy(update={"function": name, "weight": 1.0, "extra": {}})


def part_means(scores: Sequence[Sequence[Score]], *, world: World) -> dict[str, float]:
    """reward/<name> of each reward that was weighed, as the mean over all ranks of what it could score."""
    sums: dict[str, list[float]] = {}
    for score in (score for own in scores for score in own if isinstance(score, WeighedScore)):
        for name, value in score.parts.items():
            total = sums.setdefault(name, [0.0, 0.0])
            if value is not None:
                total[0] += value
                total[1] += 1.0
    everywhere: dict[str, list[float]] = {}
    for theirs in world.gather_json(sums):
        for name, (total, count) in theirs.items():
            before = everywhere.setdefault(name, [0.0, 0.0])
            everywhere[name] = [before[0] + total, before[1] + count]
    return {f"reward/{name}": total / count for name, (total, count) in everywhere.items() if count}


def _checked(value: float) -> Score:
    return Score(value) if math.isfinite(value) else Score(None, f"its score is {value}")
