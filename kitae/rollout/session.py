"""Requests that run side by side, added and cancelled while others run: the loop that every local engine turns.

    add -> waiting groups --enter--> rows with a first token --advance--> more tokens --> events, and rows that leave

What rows are (a cache, pages) and how tokens are computed is the engine's own; see Rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kitae import backends
from kitae.config import SamplingSettings
from kitae.rollout.base import OnRollout, OnTokens, Request, as_rollout, check_length, make_requests
from kitae.rollout.scheduler import Scheduler
from kitae.types import FinishReason, Problem, Rollout

if TYPE_CHECKING:
    from kitae.rollout.budget import Budget

STREAM_S = 0.1
"""Somebody who reads along sees new tokens about this often."""


class Event(NamedTuple):
    """What one step brought to one request."""

    request: Request
    token_ids: list[int]
    """The new tokens; their log-probabilities are the last ones of request.logprobs."""
    text: str
    """The text they add, for a request that wants text: without end token or stop string, in whole characters."""
    finish_reason: FinishReason | None
    """Set where these are its last tokens."""

    def after(self, earlier: Event) -> Event:
        """Both events of one request as one."""
        tokens, text = earlier.token_ids + self.token_ids, earlier.text + self.text
        return Event(self.request, tokens, text, self.finish_reason)


class Rows(Protocol):
    """The rows of one engine; every method draws tokens by Request.add and nothing else."""

    def enter(self, groups: list[list[Request]]) -> None:
        """Compute each group's prompt, once, and draw the next token of all its rows, which is the first but for a row
        that advance() has put back.
        """
        ...

    def advance(self, scheduler: Scheduler, *, within_s: float | None) -> None:
        """Draw one or more tokens of every running row, and be back in about `within_s` seconds."""
        ...

    def leave(self, request: Request) -> None:
        """Free what the row held."""
        ...


class Session:
    """Requests under way on one engine. Not for several threads at once."""

    def __init__(
        self,
        rows: Rows,
        scheduler: Scheduler,
        *,
        decode: Callable[[list[int]], str],
        context: int | None,
        budget: Budget | None = None,
    ) -> None:
        """No prompt and completion together may have more than `context` tokens, nor more than `budget` has room for."""
        self._rows, self._scheduler, self._decode, self._context = rows, scheduler, decode, context
        self.budget = budget
        self._num_added = 0

    def add(
        self,
        problem: Problem,
        *,
        limits: Sequence[int],
        sampling: SamplingSettings,
        seed: int = 0,
        wants_text: bool = False,
        num_top_logprobs: int = 0,
    ) -> list[Request]:
        """Queue one completion per limit, the most tokens it may have; they share the prompt's keys and values.

        Tokens depend on the weights, the prompt, the sampling settings, `seed`, the problem's index and the place in
        the group; not on what else runs. What does not fit the context or the memory is refused.
        """
        check_length(problem, max(limits, default=0), number=self._num_added, context=self._context)
        if self.budget is not None:
            self.budget.require(problem, max(limits, default=0))
        group = make_requests(
            problem,
            limits,
            number=self._num_added,
            sampling=sampling,
            seed=seed,
            decode=self._decode if wants_text or sampling.stop else None,
            num_top_logprobs=num_top_logprobs,
        )
        self._scheduler.add(group)
        self._num_added += 1
        return group

    def cancel(self, request: Request) -> None:
        """It gets no more tokens and no more events; its row is free at the next step."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"

    def step(self, *, within_s: float | None = None) -> list[Event]:
        """Let waiting groups enter, and draw tokens of every running row: one each, or several in about `within_s`.

        With no limit of time an engine takes as many at once as is fastest.
        """
        seen: dict[Request, int] = {r: len(r.token_ids) for r in self._scheduler.running}
        self._retire()
        is_read = within_s is not None
        while entering := self._scheduler.admit(at_once=is_read):
            seen |= {request: len(request.token_ids) for group in entering for request in group}
            self._rows.enter(entering)
            self._retire()
            if is_read:  # others wait for their tokens, and these for their first one to be shown
                within_s = 0.0
                break
        if self._scheduler.running:
            self._rows.advance(self._scheduler, within_s=within_s)
            self._retire()
        return [_event(request, count) for request, count in seen.items() if len(request.token_ids) > count]

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self._scheduler.is_done

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    def _retire(self) -> None:
        for request in self._scheduler.retire():
            self._rows.leave(request)


def _event(request: Request, count: int) -> Event:
    reason = request.finish_reason
    assert reason != "cancelled", request  # cancelled rows leave before a step, not during one
    text = request.text.take(is_last=reason is not None) if request.text else ""
    return Event(request, request.token_ids[count:], text, reason)


class SessionEngine(Protocol):
    """An engine that holds the policy in this process."""

    max_rows: int
    stop_ids: frozenset[int]
    decode: Callable[[list[int]], str]

    def open_session(self, *, max_rows: int | None = None, longest: int | None = None) -> Session:
        """A session without requests; at most `max_rows` rows run at a time, and none has more than `longest` tokens.

        It ends with the next sync() of the engine: what it has computed is of the weights before.
        """
        ...


def sample_groups(
    engine: SessionEngine,
    problems: Sequence[Problem],
    *,
    n: int,
    sampling: SamplingSettings,
    seed: int,
    on_tokens: OnTokens | None = None,
    on_rollout: OnRollout | None = None,
) -> list[list[Rollout]]:
    """RolloutEngine.generate, of an engine that has sessions."""
    limits = [[sampling.max_new_tokens] * n] * len(problems)
    return sample_all(
        engine,
        limits,
        problems=problems,
        sampling=sampling,
        seed=seed,
        on_tokens=on_tokens,
        on_rollout=on_rollout,
    )


@backends.enough_memory(
    "sampling",
    remedy="let fewer completions run at the same time (rollout.inference_batch_size, --batch_size), or give their keys and "
    "values less room (kv_cache_tokens)",
)
def sample_all(
    engine: SessionEngine,
    limits: Sequence[Sequence[int]],
    *,
    problems: Sequence[Problem],
    sampling: SamplingSettings,
    seed: int,
    on_tokens: OnTokens | None = None,
    on_rollout: OnRollout | None = None,
) -> list[list[Rollout]]:
    """As generate, with a limit of its own per completion: limits[p][s] tokens for sample s of problem p."""
    lengths = [len(p.token_ids) + limit for p, own in zip(problems, limits, strict=True) for limit in own]
    session = engine.open_session(
        max_rows=min(engine.max_rows, max(1, len(lengths))), longest=max(lengths, default=1)
    )
    groups = [
        session.add(problem, limits=own, sampling=sampling, seed=seed)
        for problem, own in zip(problems, limits, strict=True)
    ]
    finished: dict[Request, Rollout] = {}
    while not session.is_idle:
        for request, token_ids, _, reason in session.step(within_s=STREAM_S if on_tokens else None):
            place = request.problem_number, request.sample_number
            if on_tokens is not None:
                on_tokens(*place, token_ids)
            if reason is not None:
                finished[request] = as_rollout(request, stop_ids=engine.stop_ids, decode=engine.decode)
                if on_rollout is not None:
                    on_rollout(*place, finished[request])
    return [[finished[request] for request in group] for group in groups]
