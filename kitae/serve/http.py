"""The HTTP server around the application: uvicorn, with limits of time that it has not.

A connection that does not send a whole request head in time, or does not read what it is sent, is closed; a stalled
reader's completion is thereby cancelled. On SIGTERM and Ctrl-C nothing new is taken, and answers under way may finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 1 << 16
HEAD_TIMEOUT_S = 10.0
"""From the first wait for a request to the end of its head."""
WRITE_TIMEOUT_S = 60.0
"""So long a reader may take nothing while its buffers are full."""
KEEP_ALIVE_S = 60
"""An idle connection is kept this long."""


class GatheredWrites:
    """A transport that sends at once what is written in one turn of the event loop: a head and the first event, or the last
    events and the body's end. Each call of the system costs time that the engine's thread wants.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """See asyncio.WriteTransport."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        """See asyncio.BaseTransport."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        """All else is the transport's own."""
        return getattr(self._transport, name)


class TimedProtocol(H11Protocol):
    """A connection with limits of time; subclasses may set others."""

    head_timeout_s = HEAD_TIMEOUT_S
    write_timeout_s = WRITE_TIMEOUT_S
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(cast(asyncio.Transport, GatheredWrites(transport, self.loop)))
        self._head_timer = self.loop.call_later(self.head_timeout_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif not is_answering and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def on_response_complete(self) -> None:
        """What uvicorn calls after an answer; it keeps an idle connection for a time of its own."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class Server(uvicorn.Server):
    """uvicorn's server, which says when it is ready and ends politely."""

    def __init__(
        self, config: uvicorn.Config, *, on_ready: Callable[[], None], on_end: Callable[[], None]
    ) -> None:
        """`on_end` is called when it is asked to end, before the answers under way are waited for."""
        super().__init__(config)
        self._on_ready, self._on_end = on_ready, on_end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        self._on_end()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End on SIGTERM and SIGINT, and leave with 0 afterwards; the second one does not wait."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def end(self) -> None:
        """Take nothing new, and end when the answers under way are finished."""
        self.force_exit = self.should_exit
        self.should_exit = True


def make_server(
    app: ASGIApp,
    *,
    grace_s: float,
    on_ready: Callable[[], None],
    on_end: Callable[[], None],
    protocol: type[TimedProtocol] = TimedProtocol,
) -> Server:
    """A server for `await serve(sockets=[...])`; answers under way may take `grace_s` to finish when it ends."""
    options: dict[str, Any] = {"ws": "none", "lifespan": "off", "loop": "asyncio", "log_config": None}
    config = uvicorn.Config(
        app,
        http=protocol,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        access_log=False,
        server_header=False,
        **options,
    )
    return Server(config, on_ready=on_ready, on_end=on_end)
