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
from kitae.rollout.sampling import Draw, History
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
    kept_ids: list[list[int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion so far."""
        return self.prompt_length + len(self.token_ids)

    def add(self, draw: Draw, row: int, *, stop_ids: Collection[int]) -> None:
        """Append the row's sampled token, and finish if it ends the completion or is the last one allowed."""
        token = draw.token_ids[row]
        self.token_ids.append(token)
        self.logprobs.append(draw.logprobs[row])
        if draw.kept_ids is not None:
            self.kept_ids.append(draw.kept_ids[row])
        if self.history is not None:
            self.history.append(token)
        if token in stop_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.max_new_tokens:
            self.finish_reason = "length"


def make_requests(
    problems: Sequence[Problem], limits: Sequence[Sequence[int]], *, sampling: SamplingSettings, seed: int
) -> list[list[Request]]:
    """One request per completion: limits[p][s] is the most tokens that sample s of problem p may have."""
    assert all(limit >= 1 for group in limits for limit in group), limits
    needs_history = sampling.repetition_penalty != 1 or sampling.no_repeat_ngram_size > 0
    return [
        [
            Request(
                problem_number=number,
                sample_number=sample,
                prompt_length=len(problem.token_ids),
                max_new_tokens=limit,
                uniforms=random.Random(request_seed(seed, problem.index, sample)),
                history=History(problem.token_ids, ngram_size=sampling.no_repeat_ngram_size)
                if needs_history
                else None,
            )
            for sample, limit in enumerate(limits[number])
        ]
        for number, problem in enumerate(problems)
    ]


def request_seed(seed: int, index: int, sample: int) -> int:
    """Seed of one completion's random numbers; it says which completion it is, not where or when it is sampled."""
    return int.from_bytes(blake2b(f"{seed}/{index}/{sample}".encode(), digest_size=8).digest())


def check_lengths(
    problems: Sequence[Problem], limits: Sequence[Sequence[int]], *, context: int | None
) -> None:
    """Refuse prompts without tokens, and completions that could grow beyond the model's context."""
    for number, (problem, allowed) in enumerate(zip(problems, limits, strict=True)):
        length, longest = len(problem.token_ids), max(allowed, default=0)
        which = f"prompt {number} (row {problem.index} of its data)"
        if length == 0:
            raise DataError(f"{which} has no tokens to continue from")
        if context is None or length + longest <= context:
            continue
        if length >= context:
            raise ConfigError(
                f"{which} fills the model's context of {context} with {length} tokens; shorten it"
            )
        raise ConfigError(
            f"{which} has {length} tokens and max_new_tokens is {longest}: together {length + longest}, but the "
            f"model's context is {context}; lower max_new_tokens to {context - length} or shorten the prompt"
        )


def as_rollout(
    request: Request, problem: Problem, *, stop_ids: Collection[int], decode: Callable[[list[int]], str]
) -> Rollout:
    """A finished request as others see it."""
    assert request.finish_reason is not None, request
    ids = request.token_ids
    return Rollout(
        problem=problem,
        text=problem.prefill + decode(ids[:-1] if ids[-1] in stop_ids else ids),
        token_ids=ids,
        logprobs=request.logprobs,
        kept_ids=request.kept_ids or None,
        finish_reason=request.finish_reason,
    )
