"""One choice of an answer while it grows: from the engine's progress to what a chunk, or the whole answer, says.

Every choice can be read both ways: `add` gives the chunks that are due, `whole` what they add up to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from kitae.serve.answers import chat_logprobs, text_logprobs
from kitae.serve.engine import Progress
from kitae.serve.lanes import TokenScore
from kitae.serve.thinking import Splitter
from kitae.serve.tokens import TokenTexts


class Choice(Protocol):
    """What the two kinds have in common."""

    num_tokens: int

    def begin(self) -> list[dict[str, Any]]:
        """The chunks before any token."""
        ...

    def add(self, progress: Progress) -> list[dict[str, Any]]:
        """The chunks that new tokens bring, the last of all with finish_reason."""
        ...

    def whole(self) -> dict[str, Any]:
        """The choice of an answer in one piece."""
        ...


class ChatChoice:
    """A choice of a chat completion; the prefilled `<think>` is put back at its front."""

    def __init__(
        self,
        index: int,
        *,
        prefill: str,
        splits: bool,
        texts: TokenTexts,
        stop_ids: Collection[int],
        wants_logprobs: bool,
    ) -> None:
        """`splits`: thinking goes to reasoning_content."""
        self.num_tokens = 0
        self._index, self._texts, self._stop_ids = index, texts, stop_ids
        self._prefill = "" if "</think>" in prefill else prefill  # a closed block says that it does not think
        self._splitter = Splitter() if splits else None
        self._content = self._reasoning = ""
        self._logprobs: dict[str, Any] | None = {"content": [], "refusal": None} if wants_logprobs else None
        self._finish_reason: str | None = None

    def begin(self) -> list[dict[str, Any]]:
        """See Choice."""
        first = self._chunk({"role": "assistant", "content": ""})
        return [first, *self._said(self._prefill, None, is_last=False)]

    def add(self, progress: Progress) -> list[dict[str, Any]]:
        """See Choice."""
        event = progress.event
        self.num_tokens += len(event.token_ids)
        logprobs = None
        if self._logprobs is not None:
            ids = [i for i in event.token_ids if i not in self._stop_ids]
            logprobs = chat_logprobs(
                self._texts, ids, progress.logprobs[: len(ids)], progress.top_logprobs[: len(ids)]
            )
            self._logprobs["content"] += logprobs["content"]
        chunks = self._said(event.text, logprobs, is_last=event.finish_reason is not None)
        if event.finish_reason is not None:
            self._finish_reason = event.finish_reason
            chunks.append(self._chunk({"content": ""}, finish_reason=self._finish_reason))
        return chunks

    def whole(self) -> dict[str, Any]:
        """See Choice."""
        message: dict[str, Any] = {"role": "assistant", "content": self._content, "refusal": None}
        if self._splitter is not None:
            message["reasoning_content"] = self._reasoning or None
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs,
            "finish_reason": self._finish_reason,
        }

    def _said(self, text: str, logprobs: dict[str, Any] | None, *, is_last: bool) -> list[dict[str, Any]]:
        reasoning, content = (
            ("", text) if self._splitter is None else self._splitter.add(text, is_last=is_last)
        )
        self._reasoning += reasoning
        self._content += content
        if not (reasoning or content or (logprobs and logprobs["content"])):
            return []
        delta = {"content": content} | ({"reasoning_content": reasoning} if reasoning else {})
        return [self._chunk(delta, logprobs=logprobs)]

    def _chunk(
        self,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class TextChoice:
    """A choice of a text completion."""

    def __init__(
        self,
        index: int,
        *,
        echo: Sequence[int] | None,
        scores: Sequence[TokenScore | None] | None,
        texts: TokenTexts,
        stop_ids: Collection[int],
        wants_logprobs: bool,
    ) -> None:
        """`echo`: the prompt's ids where they are to be repeated; `scores`: what the model says of them."""
        self.num_tokens = 0
        self._index, self._texts, self._stop_ids = index, texts, stop_ids
        self._text = ""
        self._wants_logprobs = wants_logprobs
        self._logprobs: dict[str, list[Any]] = text_logprobs(texts, [], [], [])
        self._finish_reason = "length"
        if echo is not None:
            self._text = b"".join(map(texts.bytes, echo)).decode(errors="replace")
            known = scores or [None] * len(echo)
            self._logprobs = text_logprobs(
                texts,
                echo,
                [None if s is None else s.logprob for s in known],
                [None if s is None else s.top for s in known],
            )
        self._echo_logprobs = self._logprobs if wants_logprobs else None

    def begin(self) -> list[dict[str, Any]]:
        """See Choice."""
        return [self._chunk(self._text, self._echo_logprobs)] if self._text else []

    def add(self, progress: Progress) -> list[dict[str, Any]]:
        """See Choice."""
        event = progress.event
        self.num_tokens += len(event.token_ids)
        logprobs = None
        if self._wants_logprobs:
            # The end token is kept: clients that echo and sample one token count it.
            top = progress.top_logprobs or [{}] * len(event.token_ids)
            logprobs = text_logprobs(
                self._texts, event.token_ids, progress.logprobs, top, offset=len(self._text)
            )
            self._logprobs = {name: self._logprobs[name] + logprobs[name] for name in logprobs}
        self._text += event.text
        chunks = [self._chunk(event.text, logprobs)] if event.text or logprobs else []
        if event.finish_reason is not None:
            self._finish_reason = event.finish_reason
            chunks.append(self._chunk("", None, finish_reason=event.finish_reason))
        return chunks

    def whole(self) -> dict[str, Any]:
        """See Choice."""
        logprobs = self._logprobs if self._wants_logprobs else None
        return self._chunk(self._text, logprobs, finish_reason=self._finish_reason)

    def _chunk(
        self, text: str, logprobs: dict[str, Any] | None, *, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
