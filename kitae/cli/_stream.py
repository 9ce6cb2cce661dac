"""Completions on the terminal as they grow, with the thinking dimmed, or folded to one line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TextIO

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
_TAGS = re.compile(r"</?think>")


class Stream:
    """Writes one completion token by token: hand `on_tokens` to the engine, or `add` text that came from elsewhere."""

    def __init__(
        self,
        out: TextIO,
        *,
        decode: Callable[[list[int]], str] = lambda _: "",
        prefill: str = "",
        folds: bool = False,
    ) -> None:
        """`folds`: of the thinking only its length is shown."""
        self._out, self.decode, self._folds = out, decode, folds
        self._num_folded = 0
        self._ids: list[int] = []
        self._shown = ""
        self._tail = ""
        self._is_dim = False
        self._has_color = out.isatty() and "NO_COLOR" not in os.environ
        self._write(prefill)

    def on_tokens(self, _problem: int, _sample: int, ids: Sequence[int]) -> None:
        """Show what the new tokens add; the beginning of a character waits for its end."""
        self._ids.extend(ids)
        text = self.decode(self._ids)
        if not text.endswith("\ufffd"):
            self._write(text[len(self._shown) :])
            self._shown = text

    def add(self, text: str) -> None:
        """Show more text."""
        self._write(text)

    def finish(self) -> None:
        """Show what still waited, and end the line."""
        self._write(self.decode(self._ids)[len(self._shown) :])
        self._unfold()
        if self._is_dim and self._has_color:
            self._out.write(PLAIN)
        self._out.write("\n")
        self._out.flush()

    def _write(self, text: str) -> None:
        """Write text, dim from an opening tag to the end of a closing one; a tag may have come in pieces."""
        seen, before = self._tail + text, len(self._tail)
        start = 0
        for tag in _TAGS.finditer(seen):
            if tag.end() <= before:
                continue
            is_opening = tag[0] == "<think>"
            cut = max((tag.start() if is_opening else tag.end()) - before, 0)
            self._show(text[start:cut])
            self._switch(is_opening)
            start = cut
        self._show(text[start:])
        self._out.flush()
        self._tail = seen[1 - len("</think>") :]

    def _show(self, text: str) -> None:
        if self._folds and self._is_dim:
            self._num_folded += len(text)
        else:
            self._out.write(text)

    def _unfold(self) -> None:
        """Say how much was not shown."""
        if self._num_folded:
            self._out.write(f"[thinking, {self._num_folded:,} characters]")
            self._num_folded = 0

    def _switch(self, is_dim: bool) -> None:
        if not is_dim:
            self._unfold()
        if self._has_color and is_dim != self._is_dim:
            self._out.write(DIM if is_dim else PLAIN)
        self._is_dim = is_dim
