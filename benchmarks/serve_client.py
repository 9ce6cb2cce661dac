"""Many chats at a time over HTTP, streamed, from one thread: requests in, times and token counts out.

    queue of chats --a connection per stream--> server --server-sent events--> Answer

It shares the cores with the server it measures, so it does little: of an answer it looks for the first text and, at
the end, for the token counts; it parses nothing else.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FIRST_TEXT = re.compile(rb'"content": ?"[^"]')
PROMPT_TOKENS, COMPLETION_TOKENS = (
    re.compile(rb'"%b": ?(\d+)' % name) for name in (b"prompt_tokens", b"completion_tokens")
)
END = b"\r\n0\r\n\r\n"
"""The last piece of a chunked body."""
PAUSE_S = 0.03
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One chat completion."""

    first_token_s: float
    """From sending the request to the first text of the answer."""
    seconds: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """All answers of one measurement."""

    answers: list[Answer]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens of all streams together."""
        return sum(answer.completion_tokens for answer in self.answers) / self.seconds


def talk(port: int, key: str, chats: Sequence[dict[str, Any]], *, streams: int) -> Load:
    """Send the chats, bodies of /v1/chat/completions, `streams` at a time: the next when one has ended."""
    return asyncio.run(_talk(port, key, chats, streams=streams))


def alternate(
    port: int, key: str, chats: Sequence[dict[str, Any]], otherwise: Callable[[dict[str, Any]], float]
) -> list[tuple[float, float]]:
    """Seconds of each chat over one connection, and those that `otherwise` gives for it, in turns.

    Before each there is a pause, in which the threads of the one before stop waiting for more work at full speed.
    """

    async def run() -> list[tuple[float, float]]:
        connection = Connection(port)
        found = []
        for chat in chats:
            await asyncio.sleep(PAUSE_S)
            over_http = (await connection.ask(_request(key, chat))).seconds
            await asyncio.sleep(PAUSE_S)
            found.append((over_http, otherwise(chat)))
        connection.close()
        return found

    return asyncio.run(run())


async def _talk(port: int, key: str, chats: Sequence[dict[str, Any]], *, streams: int) -> Load:
    queue = [_request(key, chat) for chat in reversed(chats)]
    answers: list[Answer] = []

    async def stream() -> None:
        connection = Connection(port)
        while queue:
            answers.append(await connection.ask(queue.pop()))
        connection.close()

    started = time.perf_counter()
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
    return Load(answers, time.perf_counter() - started)


def _request(key: str, chat: dict[str, Any]) -> bytes:
    body = json.dumps(chat | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {key}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


class Connection:
    """One request after the other, on one connection as long as the server keeps it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def close(self) -> None:
        """No more requests."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None

    async def ask(self, request: bytes) -> Answer:
        """Send it, and read all of its answer."""
        started = time.perf_counter()
        if self._streams is not None:
            answer = await self._read(request, started)
            if answer is not None:
                return answer
            self.close()  # the server has closed it after the answer before
        self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        answer = await self._read(request, started)
        if answer is None:
            raise RuntimeError("the server closed the connection without an answer")
        return answer

    async def _read(self, request: bytes, started: float) -> Answer | None:
        """The answer; None where the connection is closed."""
        assert self._streams is not None
        reader, writer = self._streams
        first_token_s = 0.0
        found = bytearray()
        try:
            writer.write(request)
            while not found.endswith(END) and (piece := await reader.read(1 << 16)):
                found += piece
                if not first_token_s and FIRST_TEXT.search(found):
                    first_token_s = time.perf_counter() - started
        except ConnectionError:
            return None
        if not found:
            return None
        seconds = time.perf_counter() - started
        counts = [pattern.findall(found) for pattern in (PROMPT_TOKENS, COMPLETION_TOKENS)]
        if not found.startswith(b"HTTP/1.1 200") or not all(counts):
            raise RuntimeError("no whole answer: " + found[-2000:].decode(errors="replace"))
        return Answer(first_token_s or seconds, seconds, *(int(count[-1]) for count in counts))
