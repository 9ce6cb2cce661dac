"""OpenAI's answer objects, as plain dicts: whole ones and the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kitae.serve.tokens import TokenTexts

DONE = b"data: [DONE]\n\n"
NO_CHANCE = -9999.0
"""What OpenAI's API writes for a log-probability of minus infinity, which JSON has not."""


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What all objects of one answer carry."""

    model: str
    kind: str
    """chat.completion or text_completion."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> dict[str, Any]:
        """The answer in one piece."""
        return self._head(self.kind) | {"choices": list(choices), "usage": dict(counts)}

    def chunk(self, choice: Mapping[str, Any], *, wants_usage: bool) -> dict[str, Any]:
        """One piece of a stream: exactly one choice; usage is there, and null, only where it was asked for."""
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        return self._head(kind) | {"choices": [choice]} | ({"usage": None} if wants_usage else {})

    def last_chunk(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """The piece with the token counts, which has no choice."""
        return self.chunk({}, wants_usage=True) | {"choices": [], "usage": dict(counts)}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat.completion" else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def chat_logprobs(
    texts: TokenTexts, ids: Sequence[int], logprobs: Sequence[float], top: Sequence[Mapping[int, float]]
) -> dict[str, Any]:
    """choice.logprobs of a chat completion; `top` is empty where no alternatives were asked for."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.text(token), "logprob": _finite(logprob), "bytes": list(texts.bytes(token))}

    content = []
    for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        others = top[place].items() if top else ()
        content.append(entry(token, logprob) | {"top_logprobs": [entry(t, value) for t, value in others]})
    return {"content": content, "refusal": None}


def text_logprobs(
    texts: TokenTexts,
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    top: Sequence[Mapping[int, float] | None],
    *,
    offset: int = 0,
) -> dict[str, Any]:
    """choice.logprobs of a text completion; the first token of an echoed prompt has none. `offset`: characters before."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        others = top[place] if top else {}
        values = None if others is None or logprob is None else {token: logprob, **others}
        found["tokens"].append(texts.text(token))
        found["token_logprobs"].append(None if logprob is None else _finite(logprob))
        found["top_logprobs"].append(
            None if values is None else {texts.text(t): _finite(value) for t, value in values.items()}
        )
        found["text_offset"].append(offset)
        offset += len(texts.bytes(token).decode(errors="replace"))
    return found


def _finite(logprob: float) -> float:
    return max(logprob, NO_CHANCE)
