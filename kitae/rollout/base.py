"""What every rollout engine is and shares: the protocol, a request in the making, and how it becomes a Rollout.

problems --make_requests--> requests --engine samples--> requests with tokens --as_rollout--> rollouts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby
from typing import Literal, Protocol

from torch import Tensor

from kitae.config import SamplingSettings
from kitae.errors import ConfigError, DataError, NonFiniteError
from kitae.rollout.constraint import Constraint
from kitae.rollout.sampling import History, Uniforms, draw, top_logprobs
from kitae.rollout.text import GrowingText, cut_at_stop
from kitae.types import FinishReason, Problem, Rollout

OnTokens = Callable[[int, int, list[int]], None]
"""Called with (problem's place in the list, sample number, new token ids) as soon as tokens are known."""
OnRollout = Callable[[int, int, Rollout], None]
"""Called with (problem's place in the list, sample number, rollout) as soon as a completion has ended."""


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
        on_rollout: OnRollout | None = None,
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

    problem: Problem
    problem_number: int
    sample_number: int
    sampling: SamplingSettings
    max_new_tokens: int
    uniforms: Uniforms
    history: History | None = None
    """Its past, where repetition_penalty or no_repeat_ngram_size needs it."""
    text: GrowingText | None = None
    """Its text, where somebody reads along or a stop string may end it."""
    constraint: Constraint | None = None
    """The form its text must have, if any."""
    num_top_logprobs: int = 0
    wants_kept_ids: bool = True
    """Whether the ids that top-k, top-p and min-p left are kept; training needs them."""
    slot: int = -1
    """Where the cache holds its keys and values while it runs."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    """Per token, the likeliest ids of the distribution it was drawn from, where any were asked for."""
    finish_reason: FinishReason | Literal["cancelled"] | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.problem.token_ids)

    @property
    def length(self) -> int:
        """Tokens of prompt and completion so far."""
        return self.prompt_length + len(self.token_ids)

    def add(self, token: int, logprob: float, *, stop_ids: Collection[int]) -> None:
        """Append a sampled token, and finish if it ends the completion or is the last one allowed."""
        if not math.isfinite(logprob):
            raise NonFiniteError(
                f"the model's logits are not finite after {self.length} tokens of prompt {self.problem_number}: the "
                "weights are broken (a learning rate too high?) or overflow the precision they are computed in"
            )
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if self.history is not None:
            self.history.append(token)
        if (
            token in stop_ids
            or (self.text is not None and self.text.add(token))
            or (self.constraint is not None and self.constraint.accept(token))
        ):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.max_new_tokens:
            self.finish_reason = "length"


def draw_tokens(logits_BV: Tensor, requests: Sequence[Request], *, stop_ids: Collection[int]) -> None:
    """The next token of each request from its row of logits, which may be overwritten."""
    for logits_V, request in zip(logits_BV, requests, strict=True):
        if request.constraint is not None:
            request.constraint.mask_(logits_V)
    for _, same in groupby(range(len(requests)), key=lambda row: requests[row].sampling):
        rows = list(same)
        here, logits = [requests[row] for row in rows], logits_BV[rows[0] : rows[-1] + 1]
        sampled = draw(
            logits,
            sampling=here[0].sampling,
            uniforms=[r.uniforms.take()[0] for r in here],
            histories=[r.history for r in here],
        )
        for row, request in enumerate(here):
            if sampled.kept_ids is not None and request.wants_kept_ids:
                request.kept_ids.append(sampled.kept_ids[row])
            if request.num_top_logprobs:
                request.top_logprobs.append(top_logprobs(logits[row], request.num_top_logprobs))
            request.add(sampled.token_ids[row], sampled.logprobs[row], stop_ids=stop_ids)


def make_requests(
    problem: Problem,
    limits: Sequence[int],
    *,
    number: int,
    sampling: SamplingSettings,
    seed: int,
    decode: Callable[[list[int]], str] | None = None,
    num_top_logprobs: int = 0,
) -> list[Request]:
    """The group of one problem: limits[s] is the most tokens that sample s may have; with `decode` they know their text."""
    assert all(limit >= 1 for limit in limits), limits
    needs_history = sampling.repetition_penalty != 1 or sampling.no_repeat_ngram_size > 0
    return [
        Request(
            problem=problem,
            problem_number=number,
            sample_number=sample,
            sampling=sampling,
            max_new_tokens=limit,
            uniforms=Uniforms(request_seed(seed, problem.index, sample)),
            history=History(problem.token_ids, ngram_size=sampling.no_repeat_ngram_size)
            if needs_history
            else None,
            text=GrowingText(decode, stop=sampling.stop) if decode else None,
            num_top_logprobs=num_top_logprobs,
        )
        for sample, limit in enumerate(limits)
    ]


def request_seed(seed: int, index: int, sample: int) -> int:
    """Seed of one completion's random numbers; it says which completion it is, not where or when it is sampled."""
    return int.from_bytes(blake2b(f"{seed}/{index}/{sample}".encode(), digest_size=8).digest())


def check_length(problem: Problem, longest: int, *, number: int, context: int | None) -> None:
    """Refuse a prompt without tokens, and completions that could grow beyond the model's context."""
    length = len(problem.token_ids)
    which = f"prompt {number} (row {problem.index} of its data)"
    if length == 0:
        raise DataError(f"{which} has no tokens to continue from")
    if context is None or length + longest <= context:
        return
    if length >= context:
        raise ConfigError(f"{which} fills the model's context of {context} with {length} tokens; shorten it")
    raise ConfigError(
        f"{which} has {length} tokens and max_new_tokens is {longest}: together {length + longest}, but the "
        f"model's context is {context}; lower max_new_tokens to {context - length} or shorten the prompt"
    )


def as_rollout(request: Request, *, stop_ids: Collection[int], decode: Callable[[list[int]], str]) -> Rollout:
    """A finished request as others see it."""
    ids, reason = request.token_ids, request.finish_reason
    assert reason is not None and reason != "cancelled", request
    text, sampling = decode(ids[:-1] if ids[-1] in stop_ids else ids), request.sampling
    return Rollout(
        problem=request.problem,
        text=request.problem.prefill + cut_at_stop(text, sampling.stop, keep=sampling.keeps_stop),
        token_ids=ids,
        logprobs=request.logprobs,
        kept_ids=request.kept_ids or None,
        finish_reason=reason,
    )
