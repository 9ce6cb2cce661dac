"""A LoRA adapter as a GGUF file of its own, for llama.cpp's --lora on the base in GGUF.

Of each weight W + scale B A, the file holds A as NAME.lora_a and B as NAME.lora_b, B's rows in the order in which the
base's file has the weight's. llama.cpp multiplies by alpha / rank; alpha is 1 there, and B carries the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitae.errors import ModelError
from kitae.export import folders, gguf_file
from kitae.export.adapter import Change
from kitae.export.convert import How
from kitae.export.disk import os_errors
from kitae.export.gguf_read import Opened, open_gguf, without_adapter
from kitae.export.gguf_tensors import KV_B, Pieces, Target, architecture, targets_of
from kitae.export.gguf_types import Typed
from kitae.export.shards import Progress
from kitae.export.source import Source, open_source
from kitae.export.verify_tensors import Pair, Tensors, compare_all
from kitae.export.weights import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Half(Source):
    """The adapter's A (is_b False) or B of each adapted weight, in the place of the weight."""

    is_b: bool

    @property
    def names(self) -> list[str]:
        return list(self.changes)

    def shape(self, name: str) -> tuple[int, ...]:
        matrix = self._matrix(name, 0)
        whole = self.weights.shape(name)
        return (whole[0], *matrix.shape) if len(whole) == 3 else tuple(matrix.shape)

    def open(self, name: str) -> Rows:
        if len(self.weights.shape(name)) == 3:
            return lambda start, stop: torch.stack([self._matrix(name, i) for i in range(start, stop)])
        matrix = self._matrix(name, 0)
        return lambda start, stop: matrix[start:stop]

    def _matrix(self, name: str, expert: int) -> Tensor:
        [low] = self.changes[name].low_rank
        a, b = low.matrices(expert if low.expert is None else low.expert)
        if not self.is_b:
            return a
        rows = self.weights.shape(name)[-2]
        return b[low.first_row : low.first_row + rows] * (low.scale * len(a))


def write_lora(
    adapter: str,
    how: How,
    *,
    kind: str = "F16",
    base: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write an adapter as F16 or F32; what llama.cpp cannot add to a base is refused by name."""
    source = open_source(adapter, base=base)
    if source.adapter is None:
        raise ModelError(f"{adapter} is no adapter; leave out --adapter_only to write the model")
    arch = architecture(source.config)
    for name, change in source.changes.items():
        _require_expressible(name, change)
    typed = [Typed(target, kind, kind) for pair in _pairs(source) for target in pair]

    def describe(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_name(how.output.stem)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 1.0)

    file = gguf_file.plan(how.output.name, arch, typed, describe)
    identity = {
        "command": "gguf-lora",
        "options": {"type": kind},
        "source": [folders.stamp(path) for path in source.weights.files],
        "adapter": [folders.stamp(source.adapter / name) for name in folders.ADAPTER_FILES],
    }
    with os_errors(how.output.parent):
        how.output.parent.mkdir(parents=True, exist_ok=True)
    checked = gguf_file.write(
        file,
        how.output,
        identity=identity,
        num_workers=how.threads,
        overwrite=how.overwrite,
        progress=progress or Progress(),
        check=how.check,
    )
    report = {
        "command": "gguf",
        "model": str(source.adapter),
        "base": str(source.weights.folder),
        "output": str(how.output),
        "type": kind,
        "tensors": len(typed),
        "bytes": file.num_bytes,
        "fallbacks": [],
    }
    return report if checked is None else {**report, "verify": checked}


def _require_expressible(name: str, change: Change) -> None:
    is_low_rank_only = len(change.low_rank) == 1 and change.instead is None and not change.bias
    transposed = any(low.is_transposed for low in change.low_rank)
    if not is_low_rank_only or transposed or name.endswith(KV_B):
        raise ModelError(
            f"llama.cpp has no place for what this adapter does to {name}; leave out --adapter_only to merge it"
        )


def _pairs(source: Source) -> Iterator[tuple[Target, Target]]:
    """(A, B) of each of the file's weights."""
    a_side, b_side = _half(source, is_b=False), _half(source, is_b=True)
    for target in targets_of(b_side):
        if not target.sources:
            continue
        yield _a_of(a_side, target), replace(target, name=f"{target.name}.lora_b")


def _half(source: Source, *, is_b: bool) -> _Half:
    return _Half(
        weights=source.weights,
        config=source.config,
        adapter=source.adapter,
        changes=source.changes,
        head_from=source.head_from,
        is_b=is_b,
    )


def _a_of(a_side: _Half, target: Target) -> Target:
    shape = a_side.shape(target.sources[0])
    if len(target.shape) == 3:
        shape = (target.shape[0], *shape[-2:])

    def pieces() -> Iterator[Tensor]:
        for name in target.sources:
            count = a_side.shape(name)[0]
            x = a_side.open(name)(0, count)
            yield x.reshape(-1, x.shape[-1])

    return Target(f"{target.name}.lora_a", shape, pieces, target.sources)


# the check -------------------------------------------------------------------------------------------------------


def check_lora(source: Source, path: Path) -> Tensors:
    """Compare what an adapter's file adds to each weight with what the adapter does."""
    opened = open_gguf(path)
    before = {target.name: target for target in targets_of(without_adapter(source))}
    after = [t for t in targets_of(source) if any(name in source.changes for name in t.sources)]
    alpha = float(opened.metadata.get("adapter.lora.alpha", 0.0))
    found = Tensors()
    wanted = {f"{target.name}.lora_{half}" for target in after for half in "ab"}
    if wanted != opened.tensors.keys():
        odd = sorted(wanted ^ opened.tensors.keys())
        found.failures.append(f"{odd[0]} (and {len(odd) - 1} more) is missing or left over")
        return found
    pairs = (
        Pair(
            name=target.name,
            kind=opened.kind(f"{target.name}.lora_a"),
            wanted=_difference(target, before[target.name]),
            found=_product(opened, target.name, alpha),
        )
        for target in after
    )
    return compare_all(pairs, found)


def _difference(after: Target, before: Target) -> Pieces:
    return lambda: (a - b for a, b in zip(after.pieces(), before.pieces(), strict=True))


def _product(opened: Opened, name: str, alpha: float) -> Pieces:
    def pieces() -> Iterator[Tensor]:
        a, b = (torch.cat(list(opened.rows(f"{name}.lora_{half}"))) for half in "ab")
        a = a.view(opened.shape(f"{name}.lora_a"))
        b = b.view(opened.shape(f"{name}.lora_b"))
        product = b @ a * (alpha / b.shape[-1])
        yield product.reshape(-1, product.shape[-1])

    return pieces
