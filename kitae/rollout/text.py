"""The text of a completion while it grows: what may be shown already, and whether a stop string is in it.

    token -> characters it adds -> held back while they may begin a stop string -> new text

Tokens are decoded a few at a time beside those before them, so a step's cost does not grow with the completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNDECIDED = "\ufffd"
"""What a decoder writes for the beginning of a character whose other bytes have not come yet."""


class GrowingText:
    """One completion's text; hand it every token but the end token."""

    def __init__(self, decode: Callable[[list[int]], str], *, stop: Sequence[str] = ()) -> None:
        """`stop`: strings that end the completion, none of them empty."""
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        # Ids before _settled are decoded for good, beside those from _context on.
        self._context = self._settled = 0
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self._new = ""
        self._undecided = ""
        self.is_stopped = False

    def add(self, token: int) -> bool:
        """Take one more token; True where it completes a stop string."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._settled])
        added = self._decode(self._ids[self._context :])[len(before) :]
        seen = self._held + added
        if (end := first_stop(seen, self._stop)) is not None:
            self._new += seen[:end]
            self._held = self._undecided = ""
            self.is_stopped = True
        elif added.endswith(UNDECIDED):
            self._undecided = added
        else:
            self._context, self._settled, self._undecided = self._settled, len(self._ids), ""
            keep = longest_beginning(seen, self._stop)
            self._new += seen[: len(seen) - keep]
            self._held = seen[len(seen) - keep :]
        return self.is_stopped

    def take(self, *, is_last: bool) -> str:
        """The text that is new since the last call; the last one also gives what was held back."""
        if is_last:
            self._new += self._held + self._undecided
            self._held = self._undecided = ""
        new, self._new = self._new, ""
        return new


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins in the text, or None."""
    return min((at for string in stop if (at := text.find(string)) >= 0), default=None)


def cut_at_stop(text: str, stop: Sequence[str], *, keep: bool = False) -> str:
    """The text before the first stop string in it; with `keep`, up to that string's end."""
    end = first_stop(text, stop)
    if end is not None and keep:
        end += min(len(string) for string in stop if text.startswith(string, end))
    return text[:end]


def longest_beginning(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of the text are the beginning of a stop string."""
    sizes = (size for string in stop for size in range(1, len(string)) if text.endswith(string[:size]))
    return max(sizes, default=0)
