"""Takes the thinking out of a growing answer: text -> (reasoning, content), the same however the text is cut.

Reasoning is what stands between a `<think>` the answer begins with and its `</think>`; white space at the borders of
both parts is left out. An answer that does not begin with the tag is content as it is.
"""

from __future__ import annotations

OPENING, CLOSING = "<think>", "</think>"


class Splitter:
    """One answer; hand it the text as it comes, and say when it has ended."""

    def __init__(self) -> None:
        self._state = "start"
        self._held = ""
        """Text that may be the beginning of a tag, or white space that may be the border's."""

    def add(self, text: str, *, is_last: bool = False) -> tuple[str, str]:
        """The reasoning and the content that are new."""
        self._held += text
        reasoning = content = ""
        if self._state == "start":
            self._start(is_last)
        if self._state == "reasoning":
            reasoning = self._reasoning(is_last)
        if self._state == "border":
            self._held = self._held.lstrip()
            self._state = "content" if self._held else "border"
        if self._state == "content":
            content, self._held = self._held, ""
        return reasoning, content

    def _start(self, is_last: bool) -> None:
        seen = self._held.lstrip()
        if seen.startswith(OPENING):
            self._held = seen.removeprefix(OPENING).lstrip()
            self._state = "reasoning"
        elif is_last or not OPENING.startswith(seen):
            self._state = "content"

    def _reasoning(self, is_last: bool) -> str:
        thought, closing, rest = self._held.partition(CLOSING)
        if closing:
            self._held, self._state = rest, "border"
            return self._lead(thought.rstrip())
        shown = self._held if is_last else self._held[: len(self._held) - _beginning(self._held)]
        shown = shown.rstrip()
        self._held = "" if is_last else self._held[len(shown) :]
        return self._lead(shown)

    _has_begun = False

    def _lead(self, thought: str) -> str:
        """Without the white space before the first word."""
        thought = thought if self._has_begun else thought.lstrip()
        self._has_begun = self._has_begun or bool(thought)
        return thought


def _beginning(text: str) -> int:
    """How many characters at the end of the text are the beginning of the closing tag."""
    return max((n for n in range(1, len(CLOSING)) if text.endswith(CLOSING[:n])), default=0)
