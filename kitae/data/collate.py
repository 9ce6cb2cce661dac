"""Rows to packed Batches: the one place in the project where inputs and targets are shifted against each other.

    rows --group by shared prompt--> segments --lay end to end--> input_ids_T, and the N predictions that count

A batch is one forward pass. Consecutive rows with the same first `prompt_length` tokens share them: the prompt is
laid once, and every completion of it continues its positions. Shared-prompt packing as in arXiv:2502.09982 (PrefixGrouper).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kitae.types import Batch, Packing, Row, Segment

ROUND_TO = 128
"""Packed lengths are rounded up to a multiple of this, so that shapes repeat (oneDNN primitives, CUDA graphs)."""


@dataclass
class _Layout:
    """What one forward pass will hold, still Python lists."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    row_of: list[int] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    streams: dict[str, list[float]] = field(default_factory=dict)

    def put(self, tokens: Sequence[int], *, prefix: Segment | None = None) -> int:
        """Lay tokens as a new segment after everything so far; return where it starts."""
        start = len(self.ids)
        first = prefix.length if prefix else 0
        self.ids.extend(tokens)
        self.positions.extend(range(first, first + len(tokens)))
        shared = (prefix.start, prefix.length) if prefix else (0, 0)
        self.segments.append(Segment(start, len(tokens), *shared))
        return start

    def predict(self, row: Row, number: int, *, offset: int, shared: int, prompt_start: int) -> None:
        """Add the row's predictions; token t of the row lies at offset + t, or in the shared prompt before it."""
        for t, is_taught in enumerate(row.loss_mask):
            if not is_taught:
                continue
            before = t - 1
            self.source.append(prompt_start + before if before < shared else offset + before)
            self.targets.append(row.token_ids[t])
            self.weights.append(row.weight)
            self.row_of.append(number)
            if row.kept_ids is not None:
                self.kept.append(row.kept_ids[t])
            for name, values in row.streams.items():
                self.streams.setdefault(name, []).append(values[t])


def collate(
    rows: Sequence[Row],
    *,
    rows_per_forward: int,
    max_tokens: int | None = None,
    share_prompts: bool = True,
    temperature: float = 1.0,
    rows_per_unit: int = 1,
) -> list[Batch]:
    """Lay rows out as batches, one forward pass each.

    A batch has at most rows_per_forward rows, and no more than max_tokens tokens unless one unit of rows_per_unit
    rows, which stay together, alone has more. Every row needs its loss_mask, streams and kept_ids as long as its tokens,
    at least one taught token beyond position 0, and the same streams and numbers as its neighbours; anything else is a
    mistake of the caller.
    """
    assert len(rows) % rows_per_unit == 0, f"{len(rows)} rows are no whole units of {rows_per_unit}"
    batches, part, size = [], list[Row](), 0

    def lay() -> None:
        batch = _batch(part, share_prompts=share_prompts, temperature=temperature)
        batches.append(replace(batch, rows_per_unit=rows_per_unit))

    for first in range(0, len(rows), rows_per_unit):
        unit = rows[first : first + rows_per_unit]
        added = _tokens_added(part[-1] if part else None, unit, share_prompts=share_prompts)
        is_full = len(part) + len(unit) > rows_per_forward
        if part and (is_full or (max_tokens is not None and size + added > max_tokens)):
            lay()
            part, size, added = [], 0, _tokens_added(None, unit, share_prompts=share_prompts)
        part.extend(unit)
        size += added
    if part:
        lay()
    return batches


def with_stream(
    rows: Sequence[Row], name: str, batches: Sequence[Batch], values: Sequence[Tensor]
) -> list[Row]:
    """The rows with one more stream: values[b] holds a number per prediction of batches[b] of these same rows."""
    numbers = [number for tensor in values for number in tensor.tolist()]
    assert len(numbers) == sum(len(batch.source_N) for batch in batches) == sum(r.num_taught for r in rows)
    given = iter(numbers)
    return [
        replace(
            row, streams={**row.streams, name: [next(given) if taught else 0.0 for taught in row.loss_mask]}
        )
        for row in rows
    ]


def empty_batch() -> Batch:
    """A batch that teaches nothing: a rank with no rows left still takes part in collectives with it."""
    row = Row(token_ids=[0, 0], loss_mask=[False, True], weight=0.0)
    return _batch([row], share_prompts=False, temperature=1.0)


def _batch(rows: Sequence[Row], *, share_prompts: bool, temperature: float) -> Batch:
    layout = _Layout()
    number = 0
    for run in _runs_with_same_prompt(rows) if share_prompts else ([row] for row in rows):
        shared = run[0].prompt_length if len(run) > 1 else 0
        prompt_start = layout.put(run[0].token_ids[:shared]) if shared else 0
        prefix = Segment(prompt_start, shared) if shared else None
        for row in run:
            _check(row)
            start = layout.put(row.token_ids[shared:], prefix=prefix)
            layout.predict(row, number, offset=start - shared, shared=shared, prompt_start=prompt_start)
            number += 1
    return _tensors(layout, list(rows), temperature=temperature)


def _runs_with_same_prompt(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Cut rows into runs of neighbours that share their prompt and have tokens beyond it."""
    run: list[Row] = []
    for row in rows:
        if run and not _same_prompt(run[0], row):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _tokens_added(before: Row | None, rows: Sequence[Row], *, share_prompts: bool) -> int:
    """Packed tokens that `rows` add after a batch whose last row is `before`."""
    added = 0
    for row in rows:
        is_shared = share_prompts and before is not None and _same_prompt(before, row)
        added += len(row.token_ids) - (row.prompt_length if is_shared else 0)
        before = row
    return added


def _same_prompt(a: Row, b: Row) -> bool:
    n = a.prompt_length
    longer = n < min(len(a.token_ids), len(b.token_ids))
    return 0 < n == b.prompt_length and longer and a.token_ids[:n] == b.token_ids[:n]


def _check(row: Row) -> None:
    n = len(row.token_ids)
    lengths = {len(row.loss_mask), *map(len, row.streams.values()), len(row.kept_ids or row.token_ids)}
    assert lengths == {n}, f"row of {n} tokens with lists of {sorted(lengths)}"
    assert not row.loss_mask[0], "the first token of a row has nothing before it to be predicted from"
    assert not any(row.loss_mask[: row.prompt_length]), "a taught token lies inside the shared prompt"


def _tensors(layout: _Layout, rows: list[Row], *, temperature: float) -> Batch:
    real = len(layout.ids)
    total = -(-real // ROUND_TO) * ROUND_TO
    padding = [0] * (total - real)
    for name, values in layout.streams.items():
        assert len(values) == len(layout.source), f"stream {name!r} is missing in some rows"
    assert len(layout.kept) in (0, len(layout.source)), "kept_ids in some rows only"
    return Batch(
        input_ids_T=torch.tensor(layout.ids + padding),
        positions_T=torch.tensor(layout.positions + padding),
        packing=Packing(segments=layout.segments, num_tokens=total),
        source_N=torch.tensor(layout.source, dtype=torch.long),
        targets_N=torch.tensor(layout.targets, dtype=torch.long),
        weights_N=torch.tensor(layout.weights, dtype=torch.float32),
        row_N=torch.tensor(layout.row_of, dtype=torch.long),
        num_rows=len(rows),
        streams={k: torch.tensor(v, dtype=torch.float32) for k, v in layout.streams.items()},
        numbers={k: torch.tensor([row.numbers[k] for row in rows]) for k in rows[0].numbers},
        kept_ids_N=layout.kept or None,
        temperature=temperature,
        rows=rows,
    )
