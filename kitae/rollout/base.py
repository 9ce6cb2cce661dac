"""What every rollout engine is and shares: the protocol, a request in the making, and how it becomes a Rollout.

    problems --make_requests--> requests --engine samples--> requests with tokens --as_rollout--> rollouts
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

from kitae.config import SamplingSettings
from kitae.errors import ConfigError, DataError
from kitae.rollout.sampling import History
from kitae.types import FinishReason, Problem, Rollout

OnTokens = Callable[[int, int, list[int]], None]
"""Called with (problem's place in the list, sample number, new token ids) as soon as tokens are known."""


class RolloutEngine(Protocol):
    """Samples completions from a policy."""

    def generate(
        self,
        problems: Sequence[Problem],
        *,
        n: int,
        sampling: SamplingSettings,
        seed: int,
        on_tokens: OnTokens | None = None,
    ) -> list[list[Rollout]]:
        """`n` completions of each problem, in the problems' order.

        A completion depends on the weights, its prompt, the sampling settings, `seed`, the problem's index and
        its number in the group; neither on its neighbours nor on how many rows run at a time.
        """
        ...

    def sync(self) -> None:
        """Take over the policy's present weights."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One completion in the making; all of it plain Python."""

    problem_number: int
    sample_number: int
    prompt_length: int
    max_new_tokens: int
    uniforms: random.Random
    """Its own source of numbers in [0, 1): one is drawn per token."""
    history: History | None = None
    """Its past, where repetition_penalty or no_repeat_ngram_size needs it."""
    slot: int = -1
    """Where the cache holds its keys and values while it runs."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept_ids: list[list[int]] | None = None
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion so far."""
        return self.prompt_length + len(self.token_ids)

    def add(self, token: int, logprob: float, kept: list[int] | None, *, stop_ids: Collection[int]) -> None:
        """Append a sampled token, and finish if it ends the completion or is the last allowed one."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if kept is not None:
            self.kept_ids = [*(self.kept_ids or []), kept] if self.kept_ids is None else self.kept_ids
        if self.history is not None:
            self.history.append(token)
        if token in stop_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.max_new_tokens:
            self.finish_reason = "length"
