"""Keys and values of the rows in flight, in pages of 16 tokens that rows with the same prompt share.

Per layer one tensor [pages, numbers], laid out as kernels/attention.h and kernels/latent.h say. A page is free again
when the last row that reads it is gone, unless its tokens may come again (prefixes.py). The lowest free page is taken
first, so memory follows what is in use.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from kitae.rollout.packed import PackedModel
from kitae.rollout.prefixes import Prefixes
from kitae.rollout.structs import pointer

PAGE = 16
"""Tokens in a page."""
FIRST_BYTES = 1 << 30
"""At most this much is asked for at first; the system gives memory only where pages are written."""


class Pages:
    """The pages of all layers; page numbers are the same in each."""

    def __init__(self, model: PackedModel, *, expected: int, most: int, most_idle: int = 0) -> None:
        """`expected`: pages there could be in use, a first guess; nobody takes more than `most`, see budget.py.

        Beside them `most_idle` pages that no row reads stay known (prefixes.py), as long as nobody needs them.
        """
        self._model, self._most = model, most
        self._numbers = PAGE * model.numbers_per_token
        self._layers: list[Tensor] = []
        self._free: list[int] = []  # a heap
        self._readers: list[int] = []
        self.prefixes = Prefixes(page_size=PAGE, most_idle=most_idle)
        self._grow(min(expected, most, max(1, FIRST_BYTES // (PAGE * model.bytes_per_token))))

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
            here, there = torch.tensor(source), torch.tensor(target)
            for layer in self._layers:
                layer[there] = layer[here]

    def _grow(self, count: int) -> None:
        """Have `count` pages; one layer after the other, so that few of them exist twice."""
        old = len(self._readers)
        for number in range(len(self._model.layers)):
            layer = torch.empty((count, self._numbers), dtype=self._model.dtype)
            if old:
                layer[:old] = self._layers[number]
                self._layers[number] = layer
            else:
                self._layers.append(layer)
            self._model.layers[number].pages = pointer(layer)
        self._readers += [0] * (count - old)
        for page in range(old, count):
            heapq.heappush(self._free, page)
