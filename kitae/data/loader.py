"""Which items the next step takes: an order that depends on seed and epoch only, and a position in it.

One global order is cut into steps, and each step's items are dealt to the ranks in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from kitae.errors import CheckpointError, DataError

Item = TypeVar("Item", covariant=True)


class Loader(Generic[Item]):
    """Walks through items epoch after epoch; its state is two numbers, so resuming is exact anywhere."""

    def __init__(
        self,
        items: Sequence[Item],
        *,
        items_per_step: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        order: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        """`order` maps an epoch to the indices it visits (a Mixture's, for instance) in place of the shuffle."""
        if not len(items):
            raise DataError("there are no rows to train on")
        assert items_per_step > 0 and 0 <= rank < world_size, (items_per_step, rank, world_size)
        self._items = items
        self._items_per_step = items_per_step
        self._seed = seed
        self._shuffle = shuffle
        self._rank = rank
        self._world_size = world_size
        self._order_of = order or self._default_order
        self._epoch = 0
        self._step = 0
        self._order = self._order_of(0)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch; the last may take fewer items."""
        return -(-len(self._order) // self._items_per_step)

    @property
    def epoch(self) -> int:
        """How many epochs are complete."""
        return self._epoch

    def take(self) -> list[Item]:
        """This rank's items of the next step, possibly none where a short step has fewer items than ranks."""
        start = self._step * self._items_per_step
        chosen = self._order[start : start + self._items_per_step][self._rank :: self._world_size]
        items = [self._items[int(i)] for i in chosen]
        self._step += 1
        if self._step == self.steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        return items

    def visited(self, steps: int) -> list[int]:
        """Which items the first `steps` steps of the run take, over all ranks; each once, in the order of the data."""
        taken = {
            int(i)
            for epoch in range(-(-steps // self.steps_per_epoch))
            for i in self._order_of(epoch)[: (steps - epoch * self.steps_per_epoch) * self._items_per_step]
        }
        return sorted(taken)

    def state(self) -> dict[str, Any]:
        """Position, and what it is only valid for."""
        return {"epoch": self._epoch, "step": self._step, **self._fixed()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with the same items, seed and step size; ranks may differ."""
        differing = [
            f"{name} was {state.get(name)} and is {value}"
            for name, value in self._fixed().items()
            if state.get(name) != value
        ]
        if differing:
            raise CheckpointError(f"the position in the data belongs to another run: {'; '.join(differing)}")
        self._epoch, self._step = state["epoch"], state["step"]
        self._order = self._order_of(self._epoch)

    def _fixed(self) -> dict[str, Any]:
        return {
            "num_items": len(self._items),
            "items_per_step": self._items_per_step,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def _default_order(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(len(self._items))
        return shuffled(len(self._items), self._seed, epoch)


def shuffled(n: int, *key: int) -> Sequence[int]:
    """0 … n-1 in an order that depends on the numbers of `key` only."""
    order: Sequence[int] = np.random.default_rng(list(key)).permutation(n)  # type: ignore[assignment]
    return order
