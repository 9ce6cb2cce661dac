"""Every example of a data set as training rows, rendered once and kept on disk."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from kitae.data.chat import Template
from kitae.data.formats import Example
from kitae.data.sources import BadRows, OnProgress
from kitae.data.store import RecordStore
from kitae.errors import DataError
from kitae.types import Row

log = logging.getLogger(__name__)


class RenderedRows(Sequence[list[Row]]):
    """Item i is the list of rows of one example: several where the template rewrites earlier turns.

    Examples that have no target left within max_length tokens are left out and counted. Examples that the template
    refuses are listed together in a DataError, or left out too with skip_bad. `use` is what log lines call the rows.
    """

    def __init__(
        self,
        dataset: Sequence[Example],
        *,
        template: Template,
        max_length: int,
        use: str = "training",
        skip_bad: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._use = use
        self.counts: Counter[str] = Counter()
        """rows, tokens, taught_tokens, and what Template.rows counts."""
        self._first_unopened = ""
        self._store = RecordStore()
        bad = BadRows()
        for i in range(len(dataset)):
            if on_progress is not None and i % 100 == 0:
                on_progress(i)
            try:
                example = dataset[i]
                rows = template.rows(example, max_length=max_length, counts=self.counts)
            except DataError as error:
                bad.add(error)
                continue
            if self.counts["unopened_thinks"] and not self._first_unopened:
                self._first_unopened = example.source
            if rows:
                self._append(rows)
        self._store.finish()
        if on_progress is not None:
            on_progress(len(dataset))
        bad.settle(skip=skip_bad, num_rows=len(dataset))
        if not len(self._store):
            raise DataError(
                f"none of {len(dataset)} rows has anything left to teach within data.max_length = {max_length} tokens"
            )
        self._log(max_length)

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return [
            _row(*packed) for packed in json.loads(self._store[index if index >= 0 else len(self) + index])
        ]

    def _append(self, rows: list[Row]) -> None:
        packed = [(row.token_ids, row.prompt_length, _spans(row.loss_mask)) for row in rows]
        self._store.append(json.dumps(packed, separators=(",", ":")).encode())
        self.counts["rows"] += len(rows)
        self.counts["tokens"] += sum(len(row.token_ids) for row in rows)
        self.counts["taught_tokens"] += sum(row.num_taught for row in rows)

    def _log(self, max_length: int) -> None:
        n = self.counts
        log.info(
            "%d %s rows from %d examples, %d tokens, %.1f %% of them taught",
            n["rows"], self._use, len(self), n["tokens"], 100 * n["taught_tokens"] / n["tokens"],
        )  # fmt: skip
        if n["rows_cut"]:
            log.warning(
                "%d rows were longer than data.max_length = %d and lost their end, %d of them an answer; "
                "%d had no target left and were dropped",
                n["rows_cut"], max_length, n["answers_cut"], n["rows_dropped"],
            )  # fmt: skip
        if n["control_literals"]:
            log.warning("%d control tokens written in the data's text stay text", n["control_literals"])
        if n["unopened_thinks"]:
            log.warning(
                "%d %s examples have a </think> that no <think> comes before, neither in the row nor from the template "
                "(the first is %s); they are taught as they are. Write <think> at the start of their assistant turns",
                n["unopened_thinks"], self._use, self._first_unopened,
            )  # fmt: skip


def _spans(mask: list[bool]) -> list[tuple[int, int]]:
    """Start and end of each run of True."""
    edges = [i for i in range(len(mask) + 1) if (i < len(mask) and mask[i]) != (i > 0 and mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _row(token_ids: list[int], prompt_length: int, spans: list[tuple[int, int]]) -> Row:
    mask = [False] * len(token_ids)
    for start, end in spans:
        mask[start:end] = [True] * (end - start)
    return Row(token_ids=token_ids, loss_mask=mask, prompt_length=prompt_length)
