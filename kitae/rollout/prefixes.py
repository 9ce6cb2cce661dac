"""Which pages hold the beginnings of texts already computed, so that a text that begins alike is not computed again.

    text --16 tokens at a time--> (what came before, these tokens) -> page

A page's keys and values depend on its tokens and those before them, and on nothing else. Conversations share their system
prompt so, and each turn of one goes on from the turn before. Pages that no row reads are kept while there is room, and
the ones found longest ago go first. Nothing here knows tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

Key = tuple[int, tuple[int, ...]]


class _Known(NamedTuple):
    number: int
    """Its own for ever; 0 stands for the beginning of a text."""
    page: int


class Prefixes:
    """What is known of the pages of one session."""

    def __init__(self, *, page_size: int, most_idle: int) -> None:
        """At most `most_idle` pages are kept that no row reads; more of them hold more conversations."""
        self._page_size, self._most_idle = page_size, most_idle
        self._known: dict[Key, _Known] = {}
        self._key_of: dict[int, Key] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # the one idle longest is the first
        self._count = 0

    @property
    def num_idle(self) -> int:
        """Pages kept though no row reads them."""
        return len(self._idle)

    def find(self, token_ids: Sequence[int]) -> list[int]:
        """The pages of the longest known beginning, at least one token of the text left out: its logits are wanted."""
        pages: list[int] = []
        before = 0
        for part in self._parts(token_ids[:-1]):
            known = self._known.get((before, part))
            if known is None:
                break
            pages.append(known.page)
            before = known.number
        return pages

    def keep(self, token_ids: Sequence[int], pages: Sequence[int]) -> None:
        """Take note of what the full pages of a text hold, or will hold before anything else is computed."""
        before = 0
        for part, page in zip(self._parts(token_ids), pages, strict=False):
            key = before, part
            if key not in self._known:
                self._count += 1
                self._known[key] = _Known(self._count, page)
                self._key_of[page] = key
            before = self._known[key].number

    def is_read(self, page: int) -> None:
        """A row reads the page."""
        self._idle.pop(page, None)

    def is_left(self, page: int) -> list[int]:
        """No row reads the page any more: the pages that are free now, itself where it is not worth keeping."""
        if page not in self._key_of:
            return [page]
        self._idle[page] = None
        return self.forget(len(self._idle) - self._most_idle)

    def forget(self, count: int) -> list[int]:
        """Up to so many of the idle pages, which are free now."""
        freed = [self._idle.popitem(last=False)[0] for _ in range(min(count, len(self._idle)))]
        for page in freed:
            del self._known[self._key_of.pop(page)]
        return freed

    def _parts(self, token_ids: Sequence[int]) -> list[tuple[int, ...]]:
        size = self._page_size
        return [tuple(token_ids[end - size : end]) for end in range(size, len(token_ids) + 1, size)]
