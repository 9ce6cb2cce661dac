"""What the recipes of preferences share: the reference model's log-probs, and evaluation on held-out items.

The reference is the model as it was before step 1. An adapter's run switches its adapter off at each step; where all
weights train, every completion is scored once before step 1 and its log-prob kept on the disk, so no second model is
ever loaded:

    rows --look up, else score with the starting weights--> reference.jsonl --> Row.numbers["ref_logprob"]
"""

from __future__ import annotations

import json
import logging
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import xxhash

from kitae.algos.losses import LossFn
from kitae.algos.preference import per_side
from kitae.errors import CheckpointError
from kitae.recipes._reference import Scorer
from kitae.recipes._setup import Evaluate, Setup
from kitae.train.files import JsonLines, disk_errors
from kitae.train.learner import Learner
from kitae.train.progress import Ticker
from kitae.types import Batch, Row, TokenOutputs

log = logging.getLogger(__name__)

Collate = Callable[[Sequence[Row]], list[Batch]]
REF_LOGPROB = "ref_logprob"
"""Name of the number: the reference's log-prob of a row's whole completion."""
ITEMS_AT_A_TIME = 32
"""Items each rank scores between two writes to the disk; a kill loses no more than these."""
ITEMS_CHECKED = 2
"""Items of an earlier life of the run that each rank scores again, to see that the weights are still the same."""


class Reference(Protocol):
    """Gives rows the reference's log-prob of their completion."""

    def prepare(self, items: Sequence[list[Row]], indices: Sequence[int]) -> None:
        """Called before step 1, by all ranks together, with the items that the run will see."""

    def annotate(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the number ref_logprob; called by all ranks together."""


def reference_of(
    setup: Setup,
    learner: Learner,
    how: Literal["auto", "cache", "each_step"],
    *,
    collate: Collate,
) -> Reference:
    """The reference a recipe asked for; auto switches an adapter off at each step, and else keeps a cache.

    A cache is also kept where an adapter's run trains the model's own biases, which cannot be switched off.
    """
    cfg = setup.cfg
    is_separable = learner.policy.peft is not None and cfg.lora.bias == "none"
    if how == "each_step" or (how == "auto" and is_separable):
        return AdapterOff(learner.without_adapter(), collate=collate)
    model = cfg.model.model_dump(mode="json", include={"name_or_path", "revision", "dtype", "quantization"})
    path = setup.run.output_dir / "reference.jsonl"
    return ReferenceCache(path, model=model, learner=learner, collate=collate)


class AdapterOff:
    """Scores every row when it is needed, with the model's adapter off."""

    def __init__(self, scorer: Scorer, *, collate: Collate) -> None:
        self._scorer, self._collate = scorer, collate

    def prepare(self, items: Sequence[list[Row]], indices: Sequence[int]) -> None:
        """Nothing to prepare."""

    def annotate(self, rows: Sequence[Row]) -> list[Row]:
        return with_number(rows, REF_LOGPROB, score(self._scorer, self._collate(rows)))


class ReferenceCache:
    """Log-probs of completions under the learner's starting weights, kept in a file by the hash of the row's tokens.

    The first line of the file says which model they are of; each other line holds some rows. A file of another model
    is begun anew, one whose numbers today's weights do not give is refused.
    """

    def __init__(self, path: Path, *, model: Mapping[str, Any], learner: Learner, collate: Collate) -> None:
        self._path, self._model = path, dict(model)
        self._learner, self._collate, self._world = learner, collate, learner.world
        self._known: dict[int, float] = {}
        self._is_read = False

    def prepare(self, items: Sequence[list[Row]], indices: Sequence[int]) -> None:
        """Score the rows of these items that the file does not have, each rank its share."""
        self._read()
        mine = indices[self._world.rank :: self._world.world_size]
        self._check_some(items[i] for i in mine[:ITEMS_CHECKED])
        ticker = Ticker("items scored by the reference", total=len(indices))
        was_known = len(self._known)
        file = JsonLines(self._path) if self._world.is_main else None
        try:
            # Every rank has as many rounds as the first, which has most items.
            for first in range(0, -(-len(indices) // self._world.world_size), ITEMS_AT_A_TIME):
                taken = [items[i] for i in mine[first : first + ITEMS_AT_A_TIME]]
                new = [row for item in taken if not self._has(item) for row in item]
                found = dict(zip(map(_key, new), score(self._learner, self._collate(new)), strict=True))
                parts = [dict(part) for part in self._world.gather_json(list(found.items()))]
                for part in parts:
                    self._known |= part
                    if file is not None and part:
                        file.append({"rows": list(part.items())})
                if file is not None and any(parts):
                    file.sync()
                ticker(min((first + ITEMS_AT_A_TIME) * self._world.world_size, len(indices)))
        finally:
            if file is not None:
                file.close()
        log.info(
            "reference log-probs of %d completions in %s, %d of them computed now; no second model is needed",
            len(self._known), self._path.name, len(self._known) - was_known,
        )  # fmt: skip

    def annotate(self, rows: Sequence[Row]) -> list[Row]:
        return with_number(rows, REF_LOGPROB, [self._known[_key(row)] for row in rows])

    def _read(self) -> None:
        """Take what an earlier life of this run has scored; a file of another model is emptied."""
        if self._is_read:
            return
        self._is_read = True
        parts: list[Any] = []
        if self._world.is_main:
            file = JsonLines(self._path)
            try:
                with disk_errors(self._path):
                    lines = self._path.read_bytes().splitlines()
                is_ours = bool(lines) and _parsed(lines[0]) == {"model": self._model}
                if is_ours:
                    parts = [_parsed(line).get("rows", []) for line in lines[1:]]
                else:
                    if lines:
                        log.warning("%s is of another model and is made anew", self._path)
                    file.cut(0)
                    file.append({"model": self._model})
            finally:
                file.close()
        for part in self._world.broadcast_json(parts):
            self._known |= {int(key): float(value) for key, value in part if value is not None}

    def _has(self, item: list[Row]) -> bool:
        return all(_key(row) in self._known for row in item)

    def _check_some(self, items: Iterable[list[Row]]) -> None:
        """Refuse numbers that the weights of today do not give."""
        known = [row for item in items if self._has(item) for row in item]
        now = score(self._learner, self._collate(known))
        rounding = 2e-3 if self._learner.policy.dtype == torch.float32 else 5e-2  # generously, per token
        is_off = any(
            abs(value - self._known[_key(row)]) > rounding * math.sqrt(row.num_taught)
            for row, value in zip(known, now, strict=True)
        )
        if any(self._world.gather_json(is_off)):
            raise CheckpointError(
                f"the reference log-probs in {self._path} are not those of {self._model['name_or_path']} "
                "(model.name_or_path): its weights have changed since; put them back, or start anew with --overwrite"
            )


def score(scorer: Scorer, batches: Sequence[Batch]) -> list[float]:
    """The log-prob of each row's completion, in the order of the rows."""
    found: list[float] = []
    for batch, logprobs_N in zip(batches, scorer.logprobs(batches), strict=True):
        sums_B = torch.zeros(batch.num_rows, dtype=torch.float64)
        found += sums_B.index_add(0, batch.row_N.cpu(), logprobs_N.cpu().double()).tolist()
    return found


def with_number(rows: Sequence[Row], name: str, values: Iterable[float]) -> list[Row]:
    """The rows with one more number each."""
    return [
        replace(row, numbers={**row.numbers, name: value}) for row, value in zip(rows, values, strict=True)
    ]


def reference_point(learner: Learner, batches: Sequence[Batch]) -> float:
    """KTO's z0: the mean log ratio to the reference over all ranks' mismatched rows, and at least 0.

    arXiv:2402.01306, sec. 4.1. The rows have ref_logprob.
    """
    policy = score(learner, batches)
    reference = [value for batch in batches for value in batch.numbers[REF_LOGPROB].tolist()]
    difference = sum(a - b for a, b in zip(policy, reference, strict=True))
    sums = torch.tensor([difference, len(policy)], dtype=torch.float64, device=learner.world.device)
    total, count = map(float, learner.world.sum(sums).tolist())
    return max(total / count, 0.0)


def at_reference_point(rows: Sequence[Row], learner: Learner, *, collate: Collate) -> list[Batch]:
    """KTO's forward passes: rows 0, 2, 4, ... with the number reference_point, made of the mismatched rows between them."""
    point = reference_point(learner, collate(rows[1::2]))
    return collate(with_number(rows[0::2], "reference_point", [point] * len(rows[0::2])))


def held_out_evaluator(
    setup: Setup,
    learner: Learner,
    items: Sequence[list[Row]] | None,
    loss_fn: LossFn,
    *,
    to_batches: Collate,
    rows_per_item: int,
    reference: Reference | None = None,
) -> Evaluate | None:
    """eval/loss, eval/accuracy and eval/margin of held-out items, by the recipe's own loss; None where there are none.

    `to_batches` lays this rank's rows out for the loss, rows_per_item of them for each item.
    """
    if items is None:
        return None
    world, annotated = setup.world, list[list[Row]]()

    def evaluate() -> dict[str, float]:
        if not annotated:  # once, on all ranks: what the reference says does not change
            mine = [row for i in range(world.rank, len(items), world.world_size) for row in items[i]]
            annotated.append(mine if reference is None else reference.annotate(mine))
        batches = to_batches(annotated[0])
        sums = {"rows": 0.0}
        for batch, logprobs_N in zip(batches, learner.logprobs(batches), strict=True):
            out = TokenOutputs(logprobs_N.cpu(), row_N=batch.row_N, num_rows=batch.num_rows)
            loss, metrics = loss_fn(out, batch.weights_N, **batch.streams, **batch.numbers)
            sums["rows"] += batch.num_rows
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        total: dict[str, float] = {}
        for part in world.gather_json(sums):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        count = total.pop("rows") / rows_per_item
        means = per_side({name: value / count for name, value in total.items()})
        return {f"eval/{name}": means[name] for name in ("loss", "accuracy", "margin") if name in means}

    return evaluate


def _key(row: Row) -> int:
    """A hash of what the row's log-prob depends on."""
    return xxhash.xxh3_64_intdigest(array("q", [row.prompt_length, *row.token_ids]).tobytes())


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of the file; one that a broken disk spoilt holds no rows, which are then scored again."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
