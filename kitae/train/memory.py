"""Forward passes that do not fit into memory are cut in halves; the step's result stays the same.

A batch is tried; where an allocation fails, everything done so far is undone and begun again with that batch cut in
two. Rows that are sums over one denominator may be cut anywhere but inside a unit, such as a preference pair.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch

from kitae import backends
from kitae.data.collate import collate
from kitae.errors import PlanError
from kitae.models.activations import activation_bytes
from kitae.parallel.world import World
from kitae.types import Batch

if TYPE_CHECKING:
    from kitae.models.policy import Policy

log = logging.getLogger(__name__)
T = TypeVar("T")


class Passes:
    """Runs forward passes, and remembers the smallest number of tokens that did not fit."""

    def __init__(self, policy: Policy, world: World) -> None:
        self.policy = policy
        self.world = world
        self.too_many_tokens: float = math.inf

    def run(
        self,
        batches: Sequence[Batch],
        one: Callable[[Batch], T],
        *,
        start_again: Callable[[], None] | None = None,
    ) -> list[T]:
        """one(batch) for every batch, in order; a cut batch has a result for each part.

        `start_again` undoes what calls of `one` have left behind, a failed one included; random generators are set
        back as well.
        """
        device = self.policy.device
        backend = backends.of(device)
        random_state = backend.rng_state(device)
        todo = self._cut(batches)
        done: list[T] = []
        while len(done) < len(todo):
            batch = todo[len(done)]
            try:
                done.append(one(batch))
                continue
            except (RuntimeError, MemoryError) as error:
                if not backends.is_out_of_memory(error):
                    raise
                self._refuse_if_hopeless(batch, error)
            # Here, and not in the handler: the error's traceback holds the tensors of the failed pass.
            gc.collect()
            if device.type != "cpu":
                torch.accelerator.empty_cache()
            if math.isinf(self.too_many_tokens):
                log.warning(
                    "out of memory in a forward pass of %s; passes of that size are halved from now on. The result "
                    "is the same; lower the rows per forward pass to save the time",
                    _size(batch),
                )
            self.too_many_tokens = batch.packing.num_real_tokens
            todo = self._cut(todo)
            done.clear()
            backend.set_rng_state(random_state, device)
            if start_again is not None:
                start_again()
        return done

    def _cut(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches, those of too many tokens in halves until they are smaller or single units."""
        parts: list[Batch] = []
        for batch in batches:
            is_too_large = batch.packing.num_real_tokens >= self.too_many_tokens and _num_units(batch) > 1
            parts.extend(self._cut(split_batch(batch)) if is_too_large else [batch])
        return parts

    def _refuse_if_hopeless(self, batch: Batch, error: BaseException) -> None:
        reason = backends.first_line(error)
        if self.world.world_size > 1:
            raise PlanError(
                f"rank {self.world.rank} ran out of memory in a forward pass of {_size(batch)} ({reason}). With several "
                "ranks a pass cannot be cut while the others wait; lower the rows per forward pass "
                "(train.per_device_train_batch_size, rollout.rows_per_forward)"
            ) from error
        if _num_units(batch) < 2:
            needed = activation_bytes(
                self.policy.config,
                num_tokens=batch.packing.num_tokens,
                element=self.policy.dtype.itemsize,
                recompute=self.policy.causal_lm.is_activation_checkpointing,
            )
            free, _ = backends.of(self.policy.device).memory(self.policy.device)
            raise PlanError(
                f"out of memory in a forward pass of {_size(batch)}, which cannot be cut further ({reason}). Its "
                f"activations take about {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; lower "
                "data.max_length or rollout.max_new_tokens, set model.gradient_checkpointing = true, or train "
                "fewer weights (lora.rank)"
            ) from error


def split_batch(batch: Batch) -> list[Batch]:
    """The same rows in two forward passes; predictions keep their order."""
    halves = collate(
        batch.rows,
        rows_per_forward=-(-_num_units(batch) // 2) * batch.rows_per_unit,
        share_prompts=any(segment.prefix_length for segment in batch.packing.segments),
        temperature=batch.temperature,
        rows_per_unit=batch.rows_per_unit,
    )
    return [replace(half, teacher=batch.teacher) for half in halves]


def _num_units(batch: Batch) -> int:
    return len(batch.rows) // batch.rows_per_unit


def _size(batch: Batch) -> str:
    rows = len(batch.rows)
    return f"{rows} row{'s' * (rows != 1)} and {batch.packing.num_real_tokens} tokens"
