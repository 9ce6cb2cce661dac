"""Preference examples as training rows, rendered once and kept on disk.

    Example --Template--> prompt, completions --cut to max_length--> RecordStore --> [chosen Row, rejected Row]

The rows of a pair have the same first `prompt_length` tokens, so that packing lays their prompt once.
"""

from __future__ import annotations

import json
import logging
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import xxhash

from kitae.data.chat import Template
from kitae.data.formats import Example
from kitae.data.sources import BadRows, OnProgress
from kitae.data.store import RecordStore
from kitae.errors import DataError
from kitae.types import Row

log = logging.getLogger(__name__)


class RenderedPairs(Sequence[list[Row]]):
    """Item i is `[chosen, rejected]`; with `as_labels`, one row with the number `label`, 1 or 0.

    `as_labels` makes two items of a pair. Left out and counted are items whose prompt is longer than
    max_prompt_length tokens, those that have nothing left of a completion within max_length, and pairs that differ
    only beyond it. Examples that the template refuses are listed together in a DataError, or left out too with
    skip_bad. `margin_column` names a column whose number both rows of a pair get as `margin`. `use` is what log lines
    call the items.
    """

    def __init__(
        self,
        dataset: Sequence[Example],
        *,
        template: Template,
        max_length: int,
        max_prompt_length: int | None = None,
        as_labels: bool = False,
        margin_column: str = "",
        use: str = "training",
        skip_bad: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._template, self._as_labels, self.use = template, as_labels, use
        self._max_length, self._max_prompt_length = max_length, max_prompt_length
        self.counts: Counter[str] = Counter()
        """tokens, taught_tokens; what Template.rows counts; long_prompts, emptied and equalled items that were dropped."""
        self.prompt_hashes = array("Q")
        """64-bit hash of each item's prompt, to find items that ask the same."""
        self._store = RecordStore()
        bad = BadRows()
        for i in range(len(dataset)):
            if on_progress is not None and i % 100 == 0:
                on_progress(i)
            try:
                margin = _margin(dataset[i], margin_column) if margin_column else {}
                for contents, label in _items(dataset[i], as_labels=as_labels):
                    numbers = margin if label is None else {"label": float(label)}
                    self._add(dataset[i], contents, numbers)
            except DataError as error:
                bad.add(error)
        self._store.finish()
        if on_progress is not None:
            on_progress(len(dataset))
        bad.settle(skip=skip_bad, num_rows=len(dataset))
        if not len(self._store):
            raise DataError(
                f"none of {len(dataset)} preference rows fits: {self._dropped() or 'all were left out'}"
            )
        self._log()

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        prompt, completions, numbers = json.loads(self._store[index if index >= 0 else len(self) + index])
        return [replace(_row(prompt, completion), numbers=dict(numbers)) for completion in completions]

    def _add(self, example: Example, contents: Sequence[str], numbers: dict[str, float]) -> None:
        """Render one item, and keep it or count why not."""
        counts: Counter[str] = Counter()
        rows: list[Row] = []
        for content in contents:
            asked = [turn | {"taught": False} for turn in example.messages[:-1]]
            said = replace(example, messages=[*asked, {"role": "assistant", "content": content}])
            rows += self._template.rows(said, max_length=self._max_length, counts=counts)
        if self._max_prompt_length is not None and any(
            row.prompt_length > self._max_prompt_length for row in rows
        ):
            self.counts["long_prompts"] += 1
        elif len(rows) < len(contents):
            self.counts["emptied"] += 1
        elif len(rows) == 2 and rows[0].token_ids == rows[1].token_ids:
            self.counts["equalled"] += 1
        else:
            self.counts += counts
            self._append(rows, numbers)

    def _append(self, rows: list[Row], numbers: dict[str, float]) -> None:
        length = rows[0].prompt_length
        prompt = rows[0].token_ids[:length]
        assert all(row.token_ids[:length] == prompt and row.prompt_length == length for row in rows)
        packed = [prompt, [row.token_ids[length:] for row in rows], numbers]
        self._store.append(json.dumps(packed, separators=(",", ":")).encode())
        self.prompt_hashes.append(xxhash.xxh3_64_intdigest(array("q", prompt).tobytes()))
        self.counts["tokens"] += sum(len(row.token_ids) for row in rows)
        self.counts["taught_tokens"] += sum(row.num_taught for row in rows)

    def _dropped(self) -> str:
        """What was left out for its length, as text."""
        n = self.counts
        reasons = [
            (n["long_prompts"], f"have a prompt longer than data.max_prompt_length = {self._max_prompt_length} tokens"),
            (n["emptied"], f"have nothing left of a completion within data.max_length = {self._max_length} tokens"),
            (n["equalled"], "have equal completions up to there"),
        ]  # fmt: skip
        return ", ".join(f"{count} {reason}" for count, reason in reasons if count)

    def _log(self) -> None:
        n, what = self.counts, "labelled completions" if self._as_labels else "pairs"
        log.info(
            "%d %s %s, %d tokens, %.1f %% of them in completions",
            len(self), self.use, what, n["tokens"], 100 * n["taught_tokens"] / n["tokens"],
        )  # fmt: skip
        if dropped := self._dropped():
            log.warning("some %s %s were dropped: %s", self.use, what, dropped)
        if n["rows_cut"]:
            log.warning(
                "%d completions went beyond data.max_length = %d and lost their end, %d of them an answer",
                n["rows_cut"], self._max_length, n["answers_cut"],
            )  # fmt: skip
        if n["control_literals"]:
            log.warning("%d control tokens written in the data's text stay text", n["control_literals"])
        if n["unopened_thinks"]:
            log.warning(
                "%d %s completions have a </think> that no <think> comes before; they are taught as they are",
                n["unopened_thinks"], self.use,
            )  # fmt: skip


class WithMismatched(Sequence[list[Row]]):
    """Labelled items, each followed by a second row: its prompt with the completion of another prompt.

    The other item is the next one, in the order of the data and around its end, that asks something else; so it is
    the same in every epoch, and its reference log-prob can be kept. KTO's reference point is made of these rows.
    """

    def __init__(self, items: RenderedPairs, *, max_length: int) -> None:
        self._items, self._max_length = items, max_length
        if len(set(items.prompt_hashes)) < 2:
            raise DataError(
                f"all {len(items)} {items.use} rows have the same prompt: kto compares completions of different prompts; "
                "give more of them (for evaluation: data.hold_out or data.eval)"
            )

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        [own], [other] = self._items[index], self._items[self._partner(index)]
        prompt, completion = own.token_ids[: own.prompt_length], other.token_ids[other.prompt_length :]
        mismatched = _row(prompt, completion[: self._max_length - len(prompt)])
        return [own, replace(mismatched, numbers=dict(own.numbers))]

    def _partner(self, index: int) -> int:
        hashes, n = self._items.prompt_hashes, len(self)
        return next(j % n for j in range(index + 1, index + n) if hashes[j % n] != hashes[index])


def _items(example: Example, *, as_labels: bool) -> list[tuple[list[str], bool | None]]:
    """The completions of each item an example gives, and the label of a labelled one."""
    first = example.messages[-1]["content"]
    if example.rejected is None:
        return [([first], example.label)]
    if as_labels:
        return [([first], True), ([example.rejected], False)]
    return [([first, example.rejected], None)]


def _margin(example: Example, column: str) -> dict[str, float]:
    """The pair's number `margin` from a column of its data."""
    value = example.columns.get(column)
    try:
        number = float(value) if not isinstance(value, bool) else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{example.source}: column {column!r} must be a number, as reward_model.margin_column names it; it is "
            f"{value!r}"
        )
    return {"margin": number}


def _row(prompt: list[int], completion: list[int]) -> Row:
    return Row(
        token_ids=prompt + completion,
        loss_mask=[False] * len(prompt) + [True] * len(completion),
        prompt_length=len(prompt),
    )
