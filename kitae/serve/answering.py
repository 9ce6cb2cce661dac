"""From a submitted ticket to an HTTP answer: whole, or as a stream of server-sent events.

A client that goes away, while it waits or while it reads, frees its rows at the engine's next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kitae.errors import KitaeError, NonFiniteError
from kitae.serve.answers import DONE, Frame, sse, to_json, usage
from kitae.serve.choices import Choice
from kitae.serve.engine import EngineThread, Progress, Ticket
from kitae.serve.lanes import TokenScore
from kitae.serve.metrics import Metrics
from kitae.serve.refusals import Refusal

log = logging.getLogger(__name__)
Scores = list[list[TokenScore | None]]


class ClientGone(Exception):
    """Nobody is there to read the answer."""


@dataclass(frozen=True, kw_only=True)
class Answering:
    """One answer in the making."""

    engine: EngineThread
    metrics: Metrics
    ticket: Ticket
    frame: Frame
    prompt_tokens: int
    choices_of: Callable[[Scores], Sequence[Choice]]
    """The choices, from what the model says of the prompts (empty lists where nobody asked)."""
    is_stream: bool
    wants_usage: bool
    begun: float

    async def whole(self, receive: Receive) -> Response:
        """The answer in one piece."""
        async with self._watched(receive):
            choices, news = await self._start()
            for choice in choices:
                choice.begin()
            async for progress in news:
                for piece in progress:
                    choices[piece.choice].add(piece)
        counts = self._count(choices)
        return Response(
            to_json(self.frame.whole([c.whole() for c in choices], counts)), media_type="application/json"
        )

    async def stream(self, receive: Receive) -> AsyncGenerator[bytes, None]:
        """The answer's events. What goes wrong on the way is the last of them."""
        choices: Sequence[Choice] = ()
        try:
            async with self._watched(receive):
                choices, news = await self._start()
                yield b"".join(self._chunk(chunk) for choice in choices for chunk in choice.begin())
                async for progress in news:
                    chunks = [chunk for piece in progress for chunk in choices[piece.choice].add(piece)]
                    if chunks:
                        yield b"".join(map(self._chunk, chunks))
            if not self.ticket.num_choices:  # nothing was to be sampled
                yield b"".join(
                    self._chunk(choice.whole() | {"text": "", "logprobs": None}) for choice in choices
                )
        except ClientGone:
            return
        except Refusal as refusal:
            yield sse(refusal.body())
            yield DONE
            return
        counts = self._count(choices)
        if self.wants_usage:
            yield sse(self.frame.last_chunk(counts))
        yield DONE

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return sse(self.frame.chunk(choice, wants_usage=self.wants_usage))

    async def _start(self) -> tuple[Sequence[Choice], AsyncIterator[list[Progress]]]:
        scores: Scores = []
        if any(job.scores_prompt for job in self.ticket.jobs):
            scores = await self._next()
        return self.choices_of(scores), self._news()

    async def _news(self) -> AsyncIterator[list[Progress]]:
        left = self.ticket.num_choices
        is_first = True
        while left:
            progress: list[Progress] = await self._next()
            if is_first:
                self.metrics.first_token_s.observe(time.monotonic() - self.begun)
                is_first = False
            left -= sum(piece.event.finish_reason is not None for piece in progress)
            yield progress

    async def _next(self) -> Any:
        news = await self.ticket.queue.get()
        if news is None:
            raise ClientGone
        if isinstance(news, BaseException):
            raise as_refusal(news) from news
        return news

    @contextlib.asynccontextmanager
    async def _watched(self, receive: Receive) -> AsyncIterator[None]:
        """Inside it the client's going ends the work; so does any other end of it."""
        watcher = asyncio.ensure_future(self._until_gone(receive))
        try:
            yield
        finally:
            self.engine.cancel(self.ticket)
            watcher.cancel()

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.metrics.disconnects.inc()
        self.engine.cancel(self.ticket)
        self.ticket.queue.put_nowait(None)

    def _count(self, choices: Sequence[Choice]) -> dict[str, int]:
        sampled = sum(choice.num_tokens for choice in choices)
        self.metrics.prompt_tokens.labels(self.frame.model).inc(self.prompt_tokens)
        self.metrics.completion_tokens.labels(self.frame.model).inc(sampled)
        self.metrics.request_s.observe(time.monotonic() - self.begun)
        return usage(self.prompt_tokens, sampled)


class EventStream(Response):
    """Server-sent events, sent as they come."""

    media_type = "text/event-stream"

    def __init__(self, answering: Answering) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._answering.stream(receive)) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def as_refusal(error: BaseException) -> Refusal:
    """What a client is told of an error in the engine."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, KitaeError) and not isinstance(error, NonFiniteError):
        return Refusal(str(error))
    if isinstance(error, NonFiniteError):
        return Refusal(str(error), status=500)
    return Refusal("the server failed on this request; its log says why", status=500)
