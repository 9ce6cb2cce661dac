"""Keys and values of the rows in flight, in pages of 16 tokens that rows with the same prompt share.

A page is free again when the last row that reads it is gone, unless its tokens may come again (prefixes.py). The lowest
free page is taken first, so memory follows what is in use. Where pages lie is up to a PageStore.
"""

from __future__ import annotations

import heapq
from typing import Protocol

import torch
from torch import Tensor

from kitae.rollout.packed import PackedModel
from kitae.rollout.prefixes import Prefixes
from kitae.rollout.structs import pointer

PAGE = 16
"""Tokens in a page."""
FIRST_BYTES = 1 << 30
"""At most this much is asked for at first; the system gives memory only where pages are written."""


class PageStore(Protocol):
    """The memory that pages are; page numbers are the same in each layer."""

    bytes_per_token: int
    """What all layers keep of a token."""

    def resize(self, count: int) -> None:
        """Have at least `count` pages; what lies in them stays."""
        ...

    def copy(self, source: list[int], target: list[int]) -> None:
        """Copy page by page, in every layer."""
        ...


class Pages:
    """Which pages are in use, and by how many rows."""

    def __init__(self, store: PageStore, *, expected: int, most: int, most_idle: int = 0) -> None:
        """`expected`: pages there could be in use, a first guess; nobody takes more than `most`, see budget.py.

        Beside them `most_idle` pages that no row reads stay known (prefixes.py), as long as nobody needs them.
        """
        self._store, self._most = store, most
        self._free: list[int] = []  # a heap
        self._readers: list[int] = []
        self.prefixes = Prefixes(page_size=PAGE, most_idle=most_idle)
        self._grow(min(expected, most, max(1, FIRST_BYTES // (PAGE * store.bytes_per_token))))

    @property
    def num_in_use(self) -> int:
        return len(self._readers) - len(self._free) - self.prefixes.num_idle

    def take(self, count: int) -> list[int]:
        """This many pages for one reader."""
        self._free_again(self.prefixes.forget(count - len(self._free)))
        if count > len(self._free):
            total = len(self._readers)
            needed = total + count - len(self._free)
            assert needed <= self._most, (needed, self._most)
            self._grow(max(needed, min(total * 3 // 2, self._most)))
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for page in taken:
            self._readers[page] = 1
        return taken

    def share(self, pages: list[int], *, readers: int) -> None:
        """Let so many more rows read these pages."""
        for page in pages:
            self._readers[page] += readers
            self.prefixes.is_read(page)

    def give_back(self, pages: list[int]) -> None:
        """One reader of each is gone."""
        for page in reversed(pages):  # the end of a text is of less use than its beginning
            self._readers[page] -= 1
            if self._readers[page] == 0:
                self._free_again(self.prefixes.is_left(page))

    def _free_again(self, pages: list[int]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)

    def copy(self, source: list[int], target: list[int]) -> None:
        """Copy page by page, in every layer."""
        if source:
            self._store.copy(source, target)

    def _grow(self, count: int) -> None:
        old = len(self._readers)
        self._store.resize(count)
        self._readers += [0] * (count - old)
        for page in range(old, count):
            heapq.heappush(self._free, page)


class HostPages:
    """Pages for the kernels: a tensor [pages, numbers] a layer, laid out as kernels/attention.h and kernels/latent.h say."""

    def __init__(self, model: PackedModel) -> None:
        self.layers = type(model.layers).from_buffer_copy(model.layers)
        """The model's, with these pages: several sessions may use one model."""
        self._layers = [
            torch.empty((0, PAGE * model.numbers_per_token), dtype=model.dtype) for _ in model.layers
        ]
        self.bytes_per_token = model.bytes_per_token

    def resize(self, count: int) -> None:
        """See PageStore; one layer after the other, so that few of them exist twice."""
        for number, old in enumerate(self._layers):
            layer: Tensor = old.new_empty((count, old.shape[1]))
            layer[: len(old)] = old
            self._layers[number] = layer
            self.layers[number].pages = pointer(layer)

    def copy(self, source: list[int], target: list[int]) -> None:
        """See PageStore."""
        here, there = torch.tensor(source), torch.tensor(target)
        for layer in self._layers:
            layer[there] = layer[here]
