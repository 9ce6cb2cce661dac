"""What an OpenAI-compatible endpoint answers: a body with a chat completion in it, or with what is wrong."""

from __future__ import annotations

import email.utils
import http.client
import json
import time
from typing import Any, NamedTuple

from kitae.types import FinishReason

MAX_REPLY_BYTES = 64 * 2**20


class Reply(NamedTuple):
    """What the endpoint answered to one request."""

    text: str
    finish_reason: FinishReason
    num_tokens: int | None


class Passing(Exception):
    """A failure that may pass by itself."""

    def __init__(self, reason: str, *, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def parse(content: bytes) -> Reply:
    """The reply in a response's body; Passing where it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise Passing(f"the answer is no JSON: {content[:80].decode(errors='replace')!r}") from None
    if isinstance(value, dict) and value.get("error") and not value.get("choices"):
        raise Passing(f"the answer is an error: {message_of(content)}")
    try:
        [choice, *_] = value["choices"]
        message = choice["message"]
        text = as_text(message.get("content"), message.get("reasoning_content") or message.get("reasoning"))
        reason = choice.get("finish_reason")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Passing(
            f"the answer is no chat completion: {content[:80].decode(errors='replace')!r}"
        ) from None
    usage = value.get("usage")
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Reply(
        text=text,
        # content_filter cuts an answer as the limit does: it did not end by itself.
        finish_reason="length" if reason in ("length", "content_filter") else "stop",
        num_tokens=counted if isinstance(counted, int) and counted >= 0 else None,
    )


def as_text(content: Any, reasoning: Any = None) -> str:
    """Content and separate reasoning (JSON values) as the one text that rewards read.

    Example: "4" with reasoning "2+2" -> "<think>\\n2+2\\n</think>\\n\\n4". A server whose template prefills the opening
    tag sends a closing one alone; the opening one is put back.
    """
    if isinstance(content, list):
        thoughts = [part.get("thinking") for part in content if part.get("type") == "thinking"]
        texts = [piece["text"] for t in thoughts for piece in (t if isinstance(t, list) else [{"text": t}])]
        reasoning = reasoning or "".join(texts)
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(content)
    text = content or ""
    if isinstance(reasoning, str) and reasoning.strip():
        return f"<think>\n{reasoning.strip()}\n</think>\n\n{text.lstrip()}"
    before, closing, _ = text.partition("</think>")
    return f"<think>\n{text.lstrip()}" if closing and "<think>" not in before else text


def read_body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body, before a deadline and within reason."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > MAX_REPLY_BYTES:
            raise Passing(f"the answer is larger than {MAX_REPLY_BYTES >> 20} MiB")
    return b"".join(parts)


def message_of(content: bytes) -> str:
    """What the server says is wrong: OpenAI's error.message, its like of other servers, or the text itself."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content[:1000].decode(errors="replace")
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def retry_after(text: str | None) -> float | None:
    """Seconds a server asks to wait: a number, or a date (RFC 9110, section 10.2.3)."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None
