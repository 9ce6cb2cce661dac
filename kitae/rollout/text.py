"""The text of a completion while it grows: what may be shown already, and whether a stop string is in it.

    token -> characters it adds -> held back while they may begin a stop string -> new text

Tokens are decoded a few at a time beside those before them, so a step's cost does not grow with the completion. Where no
stop string is looked for, that is done when somebody takes the text, for all tokens since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNDECIDED = "\ufffd"
"""What a decoder writes for the beginning of a character whose other bytes have not come yet."""
LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, and so the most tokens that are a part of one."""
LONGEST_UNDECIDED = 64
"""Tokens after which UNDECIDED is text: a model that repeats this character itself, or bytes that are none."""


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
        if self._stop:
            self._read(len(self._ids), as_it_is=self._is_undecided_for_long())
        return self.is_stopped

    def _is_undecided_for_long(self) -> bool:
        return len(self._ids) - self._settled > LONGEST_UNDECIDED

    def _read(self, end: int, *, as_it_is: bool = False) -> bool:
        """Decode the tokens before `end`; False where the last of them seem to be a part of a character, unless they are to
        be taken as they are.
        """
        before = self._decode(self._ids[self._context : self._settled])
        added = self._decode(self._ids[self._context : end])[len(before) :]
        seen = self._held + added
        if (stop := first_stop(seen, self._stop)) is not None:
            self._new += seen[:stop]
            self._held = self._undecided = ""
            self.is_stopped = True
        elif added.endswith(UNDECIDED) and not as_it_is:
            self._undecided = added
            return False
        else:
            self._context, self._settled, self._undecided = self._settled, end, ""
            keep = longest_beginning(seen, self._stop)
            self._new += seen[: len(seen) - keep]
            self._held = seen[len(seen) - keep :]
        return True

    def take(self, *, is_last: bool) -> str:
        """The text that is new since the last call; the last one also gives what was held back."""
        count = len(self._ids)
        if not self._stop and self._settled < count:
            # The last tokens may be a part of a character: those before them are shown.
            ends = range(count, max(count - LONGEST_CHARACTER, self._settled), -1)
            if not any(map(self._read, ends)) and self._is_undecided_for_long():
                self._read(count, as_it_is=True)
            if is_last and self._settled < count:
                self._read(count)
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
