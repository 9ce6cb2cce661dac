"""Reads the tensors of a model folder by rows, whatever they are stored as, and accounts for every one of them.

Nothing is mapped or loaded whole, but for tensors that bitsandbytes packed: memory is that of the rows asked for.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kitae.errors import MissingExtraError, ModelError
from kitae.export.fp8 import Grid, dequantize_rows
from kitae.models import files

INDEX = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"
FP8, SCALES = "F8_E4M3", ("F32", "BF16", "F16", "F8_E8M0")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
EIGHT = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
PACKED_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
PACKED_STATE = ".quant_state.bitsandbytes__"

CPU = torch.device("cpu")

Rows = Callable[[int, int], Tensor]
"""Rows start to stop of a tensor in float32; the first dimension counts rows."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of its first byte in the file."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * files.ELEMENT_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The tensors of a folder, and which of them belong together."""

    folder: Path
    files: list[Path]
    tensors: dict[str, Stored]
    """Without scales and the parts of packed weights."""
    block: tuple[int, int] = (128, 128)
    scales: dict[str, Stored] = field(default_factory=dict)
    """By the name of the FP8 weight they belong to."""
    packed: dict[str, dict[str, Stored]] = field(default_factory=dict)
    """Parts of each weight that bitsandbytes stored in 4 bits."""

    def raw(self, name: str) -> Tensor:
        """A whole tensor as it is stored."""
        return _read(self.tensors[name], 0, None)

    def scale(self, name: str) -> Tensor:
        """The scales of an FP8 weight in float32."""
        return _read(self.scales[name], 0, None).float()

    def shape(self, name: str) -> tuple[int, ...]:
        """A weight's own shape, which packing hides."""
        if name in self.packed:
            return tuple(_packed_state(self.packed[name])["shape"])
        return self.tensors[name].shape

    def open(self, name: str, *, device: torch.device = CPU) -> Rows:
        """How to read a tensor's rows in float32, made on that device of what is stored."""
        stored = self.tensors[name]
        if name in self.packed:
            whole = _unpack(stored, self.packed[name])
            return lambda start, stop: whole[start:stop].to(device)
        if name in self.scales:
            scale, grid = self.scale(name).to(device), self.grid(name)
            return lambda start, stop: dequantize_rows(
                _read(stored, start, stop).to(device), scale, start=start, grid=grid, name=name
            )
        return lambda start, stop: _read(stored, start, stop).to(device).float()

    def grid(self, name: str) -> Grid:
        """How the blocks lie over a 2-D weight."""
        rows, columns = self.tensors[name].shape
        return Grid(rows=rows, columns=columns, block=self.block)


def open_weights(folder: Path) -> Weights:
    """Every tensor of a folder's safetensors; what is missing, left over, or there twice is an error."""
    files.weight_files(folder)  # refuses what is no safetensors, and an index of other names
    index = folder / INDEX
    named = files.read_json(index)["weight_map"].values() if index.is_file() else ()
    paths = sorted({folder / name for name in named} or folder.glob("*.safetensors"))
    found: dict[str, Stored] = {}
    for path in paths:
        for stored in entries(path):
            if stored.name in found:
                raise ModelError(
                    f"{folder}: {stored.name} is in {found[stored.name].file.name} and in {path.name}; remove "
                    "the file that does not belong to the model"
                )
            found[stored.name] = stored
    _check_index(folder, found)
    config = files.read_json(folder / "config.json")
    method = config.get("quantization_config") or {}
    block = method.get("weight_block_size") or [128, 128]
    if len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ModelError(
            f"{folder}/config.json has weight_block_size {block}; two positive numbers belong there"
        )
    packed, rest = _packed_of(found)
    scales, tensors = _scales_of(folder, rest, block=(block[0], block[1]))
    unknown = sorted(
        n for n, s in tensors.items() if s.dtype not in DTYPES or (s.dtype in EIGHT and n not in scales)
    )
    if unknown:
        raise ModelError(
            f"{folder}: {unknown[0]} is stored as {tensors[unknown[0]].dtype}, which kitae cannot read"
        )
    return Weights(
        folder=folder, files=paths, tensors=tensors, block=(block[0], block[1]), scales=scales, packed=packed
    )


def read_stored(stored: Stored, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of a tensor as it is stored."""
    return _read(stored, start, stop)


def read_bytes(stored: Stored, start: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes of a tensor, counted from its first one."""
    buffer = np.empty(size, np.uint8)
    view, at = buffer.data, stored.offset + start
    descriptor = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < size:
            count = os.preadv(descriptor, [view[done:]], at + done)
            if not count:
                raise ModelError(f"{stored.file} ends within {stored.name}; it was changed while it was read")
            done += count
    finally:
        os.close(descriptor)
    return buffer


def _read(stored: Stored, start: int, stop: int | None) -> Tensor:
    shape = stored.shape
    if shape:
        first, last, _ = slice(start, stop).indices(shape[0])
        shape = (last - first, *shape[1:])
        start = first * math.prod(shape[1:]) * files.ELEMENT_BITS[stored.dtype] // 8
    size = math.prod(shape) * files.ELEMENT_BITS[stored.dtype] // 8
    data = torch.from_numpy(read_bytes(stored, start, size))
    return data.view(DTYPES[stored.dtype]).reshape(shape)


def entries(path: Path) -> Iterable[Stored]:
    """The tensors of a safetensors file."""
    checked = files.header(path)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
    for name, (dtype, shape) in checked.items():
        offset = 8 + length + entries[name]["data_offsets"][0]
        yield Stored(name, dtype, tuple(shape), path, offset)


def _check_index(folder: Path, found: dict[str, Stored]) -> None:
    """The index names exactly the tensors that are there, each in its file."""
    index = folder / INDEX
    if not index.is_file():
        return
    mapping = files.read_json(index)["weight_map"]
    missing, extra = sorted(mapping.keys() - found.keys()), sorted(found.keys() - mapping.keys())
    moved = sorted(n for n in mapping.keys() & found.keys() if found[n].file.name != mapping[n])
    for names, what in ((missing, "is in no shard"), (extra, "is in a shard but not in the index"),
                        (moved, "is in another shard than the index says")):  # fmt: skip
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ModelError(f"{index}: {names[0]} {what}{more}; download the model again")


def _scales_of(
    folder: Path, found: dict[str, Stored], *, block: tuple[int, int]
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """Scales by weight, and the other tensors; a weight without scale or a scale without weight is an error."""
    scales, tensors = {}, {}
    for name, stored in found.items():
        if name.endswith(SCALE_SUFFIX):
            scales[name.removesuffix(SCALE_SUFFIX)] = stored
        else:
            tensors[name] = stored
    for name in sorted(n for n, s in tensors.items() if s.dtype == FP8):
        if name not in scales:
            raise ModelError(
                f"{folder}: {name} is FP8, but {name}{SCALE_SUFFIX} is missing; download it again"
            )
    for name, scale in sorted(scales.items()):
        weight = tensors.get(name)
        if weight is None or weight.dtype != FP8:
            what = "there is no such weight" if weight is None else f"that weight is {weight.dtype}"
            raise ModelError(f"{folder}: {scale.name} is left over: {what}, so the model is not whole")
        wanted = tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=False))
        if len(weight.shape) != 2 or scale.shape != wanted or scale.dtype not in SCALES:
            raise ModelError(
                f"{folder}: {name} of {list(weight.shape)} has scales {scale.dtype} {list(scale.shape)}; blocks of "
                f"{block[0]} x {block[1]} (config.json) need {list(wanted)} in F32, BF16 or F8_E8M0"
            )
    return scales, tensors


# 4 bits -------------------------------------------------------------------------------------------------------


def _packed_of(found: dict[str, Stored]) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    """Parts of weights that bitsandbytes packed, by weight, and the other tensors."""
    packed: dict[str, dict[str, Stored]] = {
        name.partition(PACKED_STATE)[0]: {} for name in found if PACKED_STATE in name
    }
    rest = {}
    for name, stored in found.items():
        owner = name.partition(PACKED_STATE)[0] if PACKED_STATE in name else name.rpartition(".")[0]
        is_part = PACKED_STATE in name or name.endswith(PACKED_PARTS)
        if is_part and owner in packed:
            packed[owner][name.removeprefix(f"{owner}.")] = stored
        else:
            rest[name] = stored
    return packed, rest


def _packed_state(parts: dict[str, Stored]) -> dict[str, Any]:
    [state] = [stored for part, stored in parts.items() if PACKED_STATE[1:] in part]
    found: dict[str, Any] = json.loads(bytes(_read(state, 0, None).numpy()))
    return found


def _unpack(stored: Stored, parts: dict[str, Stored]) -> Tensor:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("weights in 4 bits need bitsandbytes; pip install 'kitae[qlora]'")
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tensors = {part: _read(where, 0, None) for part, where in parts.items()}
    state = QuantState.from_dict(tensors, device=torch.device("cpu"))
    whole: Tensor = dequantize_4bit(_read(stored, 0, None), state)
    return whole.float()
