"""Tensor by tensor, an export against what it was made of: how far off each is, and whether an adapter is in it.

Errors are relative root mean squares, of a whole tensor and of its worst block of 128 x 128: a bad scale of one block,
or two tensors in each other's place, is far outside what rounding to a type gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitae.export.gguf_read import open_gguf, without_adapter
from kitae.export.gguf_tensors import CHUNK, targets_of
from kitae.export.source import Source
from kitae.export.weights import Weights, open_weights

BLOCK = 128
ALLOWED = {
    "F64": 1e-6, "F32": 1e-6, "F16": 1e-3, "BF16": 4e-3, "F8_E4M3": 0.045, "packed": 0.15, "Q8_0": 0.02, "Q6_K": 0.04,
    "Q5_K": 0.08, "Q5_1": 0.08, "Q5_0": 0.1, "Q4_K": 0.15, "Q4_0": 0.2,
}  # fmt: skip
"""Of a tensor of each type; half as much again in one block."""
ALLOWED_OTHERS = 0.5
"""For types that llama-quantize writes, some of less than two bits."""
IN_A_BLOCK = 1.5
MIN_SHARE = 0.5
"""Of an adapter's change that has to be in a merged model."""

Pieces = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One tensor: as it should be, as it was in the base (where an adapter changes it), and as it is."""

    name: str
    kind: str
    wanted: Pieces
    found: Pieces
    before: Pieces | None = None


@dataclass(slots=True, kw_only=True)
class Tensors:
    """What was found out about all tensors."""

    count: int = 0
    worst_name: str = ""
    worst_error: float = 0.0
    worst_allowed: float = 0.0
    adapter_share: float | None = None
    """How much of the adapter's change is in the export: 1 for all, 0 for none."""
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "worst": self.worst_name,
            "worst_error": self.worst_error,
            "worst_allowed": self.worst_allowed,
            "adapter_share": self.adapter_share,
        }


def check_tensors(source: Source, candidate: Path) -> Tensors:
    """Compare every tensor of an export, a folder or a GGUF file, with the source's."""
    found = Tensors()
    pairs = (
        _of_gguf(source, candidate, found) if candidate.is_file() else _of_folder(source, candidate, found)
    )
    return compare_all(pairs, found)


def compare_all(pairs: Iterable[Pair], found: Tensors) -> Tensors:
    """Compare tensor by tensor, and say in `found` which are further off than their type explains."""
    along = wanted_square = noise = 0.0
    size = 0
    for pair in pairs:
        found.count += 1
        error, worst, share = _compare(pair)
        allowed = ALLOWED.get(pair.kind, ALLOWED_OTHERS)
        for value, limit, what in ((error, allowed, ""), (worst, allowed * IN_A_BLOCK, ", in a block")):
            if not value <= limit:
                found.failures.append(
                    f"{pair.name} ({pair.kind}) is off by {value:.2g}, not {limit:.2g}{what}"
                )
        if error / allowed >= found.worst_error / (found.worst_allowed or 1):
            found.worst_name, found.worst_error, found.worst_allowed = pair.name, error, allowed
        if share is not None:
            along, wanted_square = along + share[0], wanted_square + share[1]
            noise, size = noise + share[2], size + int(share[3])
    if wanted_square:
        found.adapter_share = along / wanted_square
        # Rounding spreads over all directions; of its length only 1 in sqrt(size) falls on the change.
        spread = math.sqrt(noise / size / wanted_square)
        if found.adapter_share < MIN_SHARE and 3 * spread < MIN_SHARE:
            found.failures.append(
                f"only {max(found.adapter_share, 0):.0%} of the adapter's change is in it: it equals the base"
            )
    return found


def _compare(pair: Pair) -> tuple[float, float, tuple[float, float, float, float] | None]:
    """(relative error, that of the worst block, what is known about the adapter's share)."""
    square = wanted_square = worst = 0.0
    share = [0.0, 0.0, 0.0, 0.0]
    befores = pair.before() if pair.before is not None else None
    for wanted, is_ in _aligned(pair.wanted(), pair.found()):
        off = (is_ - wanted).double()
        square += float((off * off).sum())
        wanted_square += float((wanted.double() ** 2).sum())
        worst = max(worst, _worst_block(off.float(), wanted))
        if befores is not None:
            change = (wanted - next(befores)).double()
            share[0] += float(((off + change) * change).sum())
            share[1] += float((change * change).sum())
            share[2] += float((off * off).sum())
            share[3] += off.numel()
    error = math.sqrt(square / wanted_square) if wanted_square else (math.inf if square else 0.0)
    return error, worst, tuple(share) if befores is not None else None  # type: ignore[return-value]


def _aligned(a: Iterator[Tensor], b: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of both of the same size, those of `a`."""
    rest = torch.empty(0, 0)
    for wanted in a:
        parts = [rest] if len(rest) else []
        while sum(map(len, parts)) < len(wanted):
            parts.append(next(b))
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        yield wanted, joined[: len(wanted)]
        rest = joined[len(wanted) :]


def _worst_block(off: Tensor, wanted: Tensor) -> float:
    """The largest relative error of blocks of 128 x 128, smaller at the edges."""

    def sums(x: Tensor) -> Tensor:
        rows, columns = x.shape
        padded = torch.nn.functional.pad(x * x, (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
        return blocks.sum((1, 3))

    is_off, size = sums(off), sums(wanted)
    relative = torch.where(is_off == 0, 0.0, (is_off / size).sqrt())
    return float(relative.max()) if relative.numel() else 0.0


# pairs -----------------------------------------------------------------------------------------------------------


def _of_gguf(source: Source, path: Path, found: Tensors) -> Iterator[Pair]:
    opened = open_gguf(path)
    befores = (
        {target.name: target for target in targets_of(without_adapter(source))} if source.changes else {}
    )
    targets = targets_of(source)
    for extra in sorted(opened.tensors.keys() - {target.name for target in targets}):
        found.failures.append(f"{extra} is left over")
    for target in targets:
        name = target.name
        if name not in opened.tensors or opened.shape(name) != target.shape:
            there = list(opened.shape(name)) if name in opened.tensors else "missing"
            found.failures.append(f"{name} is {there}, not {list(target.shape)}")
            continue
        is_changed = any(name in source.changes for name in target.sources)
        yield Pair(
            name=name,
            kind=opened.kind(name),
            wanted=target.pieces,
            found=lambda name=name: opened.rows(name),  # type: ignore[misc]
            before=befores[name].pieces if is_changed and name in befores else None,
        )


def _of_folder(source: Source, folder: Path, found: Tensors) -> Iterator[Pair]:
    weights = open_weights(folder)
    for extra in sorted(weights.tensors.keys() - set(source.names)):
        found.failures.append(f"{extra} is left over")
    for name in source.names:
        if name not in weights.tensors or weights.shape(name) != source.shape(name):
            there = list(weights.shape(name)) if name in weights.tensors else "missing"
            found.failures.append(f"{name} is {there}, not {list(source.shape(name))}")
            continue
        if name in weights.scales:
            found.failures += _empty_scales(weights, name)
        kind = "packed" if name in weights.packed else weights.tensors[name].dtype
        candidate = Source(weights=weights, config={})
        yield Pair(
            name=name,
            kind=kind,
            wanted=_rows(source, name),
            found=_rows(candidate, name),
            before=_rows(without_adapter(source), name) if name in source.changes else None,
        )


def _rows(source: Source, name: str) -> Pieces:
    shape = source.shape(name)

    def pieces() -> Iterator[Tensor]:
        read = source.open(name)
        step = max(1, CHUNK // max(1, math.prod(shape[1:])))
        step += -step % BLOCK if len(shape) == 2 else 0
        for start in range(0, shape[0] if shape else 0, step):
            x = read(start, min(start + step, shape[0]))
            yield x.reshape(-1, shape[-1]) if len(shape) > 1 else x[None]

    return pieces


def _empty_scales(weights: Weights, name: str) -> list[str]:
    """Scales that make zeros of FP8 numbers which are none."""
    grid, height, width = weights.grid(name), *weights.block
    values = weights.raw(name).view(torch.uint8) & 127  # without the sign
    empty = (weights.scale(name) == 0).nonzero().tolist()
    lost = [
        (i, j)
        for i, j in empty
        if values[i * height : (i + 1) * height, j * width : (j + 1) * width].count_nonzero()
    ]
    return (
        [f"{name}: {len(lost)} of {math.prod(grid.shape)} scales are 0 over numbers that are not"]
        if lost
        else []
    )
