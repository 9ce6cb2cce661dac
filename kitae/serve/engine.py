"""The thread that computes: takes requests from the event loop, turns the sessions, and hands tokens back.

    event loop --submit, cancel--> commands --thread: one step of each busy lane--> events --call_soon--> a Ticket's queue

Requests enter and leave between steps while others run, and prompts are scored one pass between two steps. What goes
wrong in one lane's step ends that lane's requests with an error; the thread and the other lanes go on. If the thread
itself cannot go on, every request is told so, those that come later too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kitae.config import SamplingSettings
from kitae.errors import KitaeError
from kitae.rollout.base import Request
from kitae.rollout.constraint import Constraint
from kitae.rollout.session import Event, Session
from kitae.serve.lanes import Lane, TokenScore, score
from kitae.types import Problem

log = logging.getLogger(__name__)

STEP_S = 0.05
"""About so long one step may take before others get their turn."""
SHOW_S = 0.1
"""Readers see new text about so often, and at once the first and the last of an answer; more often costs the engine time."""
SHOWN_PER_S = 256
"""All readers of a lane together are shown something so many times a second: with 64 of them, each every quarter of one."""
SWITCH_S = 0.0005
"""So long the event loop and the engine's thread may keep Python from each other; shorter costs more switches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The completions of one prompt."""

    problem: Problem
    limits: list[int]
    """The most tokens of each completion; empty: the prompt is only scored."""
    sampling: SamplingSettings
    seed: int
    num_top_logprobs: int = 0
    scores_prompt: bool = False
    """Whether the log-probabilities of the prompt's own tokens are wanted."""
    new_constraint: Callable[[], Constraint] | None = None
    """Makes each completion's constraint, where its text must have a form."""


class Progress:
    """What is new of one completion: tokens, their log-probabilities, text, and how it ended."""

    __slots__ = ("choice", "event", "logprobs", "top_logprobs")

    def __init__(self, choice: int, event: Event) -> None:
        count, request = len(event.token_ids), event.request
        self.choice, self.event = choice, event
        end = len(request.logprobs)
        self.logprobs = request.logprobs[end - count :]
        self.top_logprobs = request.top_logprobs[end - count :]


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One API request on its way; all but the queue belongs to the thread once it is submitted."""

    lane: str
    jobs: Sequence[Job]
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[list[Progress] | list[list[TokenScore | None]] | BaseException | None] = field(
        default_factory=asyncio.Queue
    )
    """Lists of news; None where the client has gone; an error, after which nothing comes."""
    requests: list[Request] = field(default_factory=list)
    is_cancelled: bool = False
    num_choices: int = 0
    num_places: int = 0
    """What the queue counts: the choices, and a prompt that is only scored as one."""
    num_ended: int = 0

    def __post_init__(self) -> None:
        self.num_choices = sum(len(job.limits) for job in self.jobs)
        self.num_places = sum(max(1, len(job.limits)) for job in self.jobs)


class EngineThread:
    """All lanes of one server, in one thread."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = {lane.name: lane for lane in lanes}
        self._sessions: dict[str, Session] = {lane.name: lane.open_session() for lane in lanes}
        self._tickets: dict[Request, tuple[Ticket, int]] = {}
        self._scoring: deque[tuple[Ticket, Iterator[None]]] = deque()
        self._held: dict[str, dict[Request, Event]] = {name: {} for name in self.lanes}
        """What each lane's readers have not been shown yet."""
        self._shown_s = dict.fromkeys(self.lanes, -math.inf)
        """When each lane's readers were last shown everything."""
        self._end: Exception | None = None
        """What ended the thread's work."""
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kitae-engine", daemon=True)
        self.num_open = 0
        """Places of what was submitted and has not ended; written by the event loop only."""

    def start(self) -> None:
        """Begin to compute."""
        sys.setswitchinterval(SWITCH_S)
        self._thread.start()

    def close(self) -> None:
        """End after the present step."""
        self._commands.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._end is None

    @property
    def most_tokens(self) -> int:
        """Prompt and completion of one request may have so many, for all that is known of memory."""
        budgets = [session.budget for session in self._sessions.values()]
        return min((budget.most_tokens for budget in budgets if budget is not None), default=sys.maxsize)

    @property
    def num_running(self) -> int:
        return sum(session.num_running for session in self._sessions.values())

    # what the event loop calls ---------------------------------------------------------------------------------

    def submit(self, ticket: Ticket) -> None:
        """Put a ticket's jobs to work; its queue gets what comes of them."""
        self.num_open += ticket.num_places
        self._commands.put(lambda: self._enter(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Nobody reads the ticket any more: its rows are free at the next step."""
        if not ticket.is_cancelled:
            ticket.is_cancelled = True
            self.num_open -= ticket.num_places - ticket.num_ended
            if ticket.num_ended < ticket.num_choices:
                self._commands.put(lambda: self._leave(ticket))
            ticket.num_ended = ticket.num_choices

    # in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            log.exception("the engine cannot go on", exc_info=error)
            self._end = error
            for ticket in {ticket for ticket, _ in (*self._tickets.values(), *self._scoring)}:
                _put(ticket, error)
            self._tickets.clear()
            while (command := self._commands.get()) is not None:
                command()

    def _work(self) -> None:
        while True:
            is_idle = not self._scoring and all(session.is_idle for session in self._sessions.values())
            try:
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                self._score_pass()
                self._step()
                continue
            if command is None:
                return
            command()

    def _step(self) -> None:
        for name, session in self._sessions.items():
            if session.is_idle:
                continue
            try:
                self.lanes[name].activate()
                events = session.step(within_s=STEP_S)
            except (
                Exception
            ) as error:  # whatever it is: it must not end the other lanes, and its readers must hear of it
                self._fail(name, error)
            else:
                self._deliver(self._gathered(name, events))

    def _enter(self, ticket: Ticket) -> None:
        if ticket.is_cancelled:
            return
        if self._end is not None:
            _put(ticket, self._end)
        elif any(job.scores_prompt for job in ticket.jobs):
            self._scoring.append((ticket, self._score(ticket)))
        else:
            self._begin(ticket)

    def _begin(self, ticket: Ticket) -> None:
        try:
            for job in ticket.jobs:
                self._add(ticket, job)
        except Exception as error:  # one request's failure is its own
            self._refuse(ticket, error)

    def _score_pass(self) -> None:
        """One pass over prompts of the request that waits longest for it; then others have their turn."""
        if not self._scoring:
            return
        ticket, passes = self._scoring.popleft()
        if ticket.is_cancelled:
            return
        try:
            self.lanes[ticket.lane].activate()
            next(passes)
        except StopIteration:
            self._begin(ticket)
        except Exception as error:  # one request's failure is its own
            self._refuse(ticket, error)
        else:
            self._scoring.append((ticket, passes))

    def _score(self, ticket: Ticket) -> Iterator[None]:
        """Score a ticket's prompts pass by pass, and hand over what came of all of them."""
        scored = [job for job in ticket.jobs if job.scores_prompt]
        found: list[list[TokenScore | None]] = []
        for part in score(
            self.lanes[ticket.lane].policy,
            [job.problem.token_ids for job in scored],
            num_top=max(job.num_top_logprobs for job in scored),
        ):
            found += part
            yield
        _put(ticket, found)

    def _refuse(self, ticket: Ticket, error: Exception) -> None:
        _log_unless_users(error)
        self._leave(ticket)
        _put(ticket, error)

    def _add(self, ticket: Ticket, job: Job) -> None:
        if not job.limits:
            return
        # Before the session has them: a request that fails leaves nothing there.
        constraints = [job.new_constraint() if job.new_constraint else None for _ in job.limits]
        requests = self._sessions[ticket.lane].add(
            job.problem,
            limits=job.limits,
            sampling=job.sampling,
            seed=job.seed,
            wants_text=True,
            num_top_logprobs=job.num_top_logprobs,
        )
        for request, constraint in zip(requests, constraints, strict=True):
            request.wants_kept_ids = False
            request.constraint = constraint
            self._tickets[request] = (ticket, len(ticket.requests))
            ticket.requests.append(request)

    def _leave(self, ticket: Ticket) -> None:
        for request in ticket.requests:
            self._held[ticket.lane].pop(request, None)
            if self._tickets.pop(request, None) is not None:
                self._sessions[ticket.lane].cancel(request)

    def _gathered(self, lane: str, events: list[Event]) -> list[Event]:
        """What is to be shown now of a step's events and of those held back before; a step may be shorter than SHOW_S."""
        now = time.monotonic()
        is_due = now - self._shown_s[lane] >= max(SHOW_S, self._sessions[lane].num_running / SHOWN_PER_S)
        if is_due:
            self._shown_s[lane] = now
        shown, held = [], self._held[lane]
        for event in events:
            if earlier := held.pop(event.request, None):
                event = event.after(earlier)
            is_first = len(event.token_ids) == len(event.request.token_ids)
            if is_due or is_first or event.finish_reason is not None:
                shown.append(event)
            else:
                held[event.request] = event
        if is_due:  # a row that waits again for memory (rollout/budget.py) has no event of its own
            shown += held.values()
            held.clear()
        return shown

    def _deliver(self, events: list[Event]) -> None:
        news: dict[Ticket, list[Progress]] = {}
        for event in events:
            found = self._tickets.get(event.request)
            if found is None:
                continue
            ticket, choice = found
            constraint = event.request.constraint
            if constraint is not None and constraint.failure is not None:
                news.pop(ticket, None)
                self._refuse(ticket, constraint.failure)
                continue
            news.setdefault(ticket, []).append(Progress(choice, event))
            if event.finish_reason is not None:
                del self._tickets[event.request]
        for loop, tickets in _by_loop(news).items():
            _tell(loop, self._hand_over, tickets)

    def _hand_over(self, news: list[tuple[Ticket, list[Progress]]]) -> None:
        """In the event loop: one wake-up for all tickets of a step."""
        for ticket, progress in news:
            if not ticket.is_cancelled:
                ended = sum(p.event.finish_reason is not None for p in progress)
                ticket.num_ended += ended
                self.num_open -= ended
                ticket.queue.put_nowait(progress)

    def _fail(self, name: str, error: Exception) -> None:
        """End every request of a lane, and give it a new session: what the old one holds may be half computed."""
        _log_unless_users(error)
        tickets = {ticket for ticket, _ in self._tickets.values() if ticket.lane == name}
        for ticket in tickets:
            self._leave(ticket)
            _put(ticket, error)
        self._sessions[name] = self.lanes[name].open_session()


def _by_loop(
    news: dict[Ticket, list[Progress]],
) -> dict[asyncio.AbstractEventLoop, list[tuple[Ticket, list[Progress]]]]:
    found: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, list[Progress]]]] = {}
    for ticket, progress in news.items():
        found.setdefault(ticket.loop, []).append((ticket, progress))
    return found


def _put(ticket: Ticket, news: list[list[TokenScore | None]] | Exception) -> None:
    _tell(ticket.loop, ticket.queue.put_nowait, news)


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[..., None], news: object) -> None:
    """Call it in the event loop; one that has been closed has nobody left to tell."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(what, news)


def _log_unless_users(error: Exception) -> None:
    if isinstance(error, KitaeError):
        log.warning("a request failed: %s", error)
    else:
        log.exception("a request failed", exc_info=error)
