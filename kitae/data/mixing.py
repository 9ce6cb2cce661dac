"""Several sources as one: mixed by weights, with rows set apart for evaluation; all by seed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from kitae.data.formats import Example
from kitae.data.loader import shuffled
from kitae.data.sources import Dataset
from kitae.errors import ConfigError, DataError

log = logging.getLogger(__name__)

MAX_HELD_OUT = 500
_HOLD_OUT, _PICK, _WITHIN = 1, 2, 3
"""First numbers of the seeds of three independent draws."""

Item = TypeVar("Item", covariant=True)


class Subset(Sequence[Item], Generic[Item]):
    """The items of another sequence at the given indices."""

    def __init__(self, items: Sequence[Item], indices: Sequence[int]) -> None:
        self.items = items
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Subset(self.items, self.indices[index])
        return self.items[int(self.indices[index])]


class Mixture(Sequence[Item], Generic[Item]):
    """Sources laid end to end, and an order that draws from each as often as its weight says.

    Hand `order` to the Loader. An epoch has as many draws as there are rows; a source drawn more often than it has
    rows starts over in a new order. Each draw depends on seed, epoch and position only.
    """

    def __init__(self, sources: Sequence[Sequence[Item]], *, weights: Sequence[float], seed: int) -> None:
        if len(weights) != len(sources):
            raise ConfigError(
                f"data.weights has {len(weights)} numbers for {len(sources)} entries of data.train"
            )
        if any(weight < 0 for weight in weights) or sum(weights) <= 0:
            raise ConfigError(f"data.weights must not be negative, nor all 0: {list(weights)}")
        if empty := [i for i, (s, w) in enumerate(zip(sources, weights, strict=True)) if w and not len(s)]:
            raise DataError(f"entry {empty[0]} of data.train has a weight but no rows")
        self._sources = sources
        self._shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._seed = seed
        self._starts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[source][index - int(self._starts[source])]

    def order(self, epoch: int) -> Sequence[int]:
        """Which item each position of an epoch takes."""
        picks = np.random.default_rng([_PICK, self._seed, epoch]).choice(
            len(self._sources), size=len(self), p=self._shares
        )
        order: Any = np.empty(len(self), dtype=np.int64)
        for source, (start, items) in enumerate(zip(self._starts, self._sources, strict=False)):
            places = np.flatnonzero(picks == source)
            passes = -(-len(places) // max(len(items), 1))
            drawn = [shuffled(len(items), _WITHIN, self._seed, epoch, source, k) for k in range(passes)]
            if drawn:
                order[places] = start + np.concatenate(drawn)[: len(places)]
        return order  # type: ignore[no-any-return]


def hold_out(
    dataset: Dataset, *, share: float, seed: int, max_rows: int = MAX_HELD_OUT
) -> tuple[Subset[Example], Subset[Example]]:
    """Training and held-out rows: min(share, max_rows, 500 rows), at least one, chosen by seed.

    Rows equal to a held-out row leave the training rows too.
    """
    count = min(int(len(dataset) * share), max_rows, MAX_HELD_OUT)
    if share > 0 and count == 0 and len(dataset) > 1:
        count = 1
    held = sorted(int(i) for i in shuffled(len(dataset), _HOLD_OUT, seed)[:count])
    hashes = {dataset.hashes[i] for i in held}
    kept = [i for i, row_hash in enumerate(dataset.hashes) if row_hash not in hashes]
    if held and not kept:
        raise DataError(f"all {len(dataset)} rows are equal: nothing is left to train on after data.hold_out")
    if held:
        equal = len(dataset) - len(kept) - len(held)
        log.info(
            "%d of %d rows held out by seed %d (%d equal rows left out)", len(held), len(dataset), seed, equal
        )
    return Subset(dataset, kept), Subset(dataset, held)
