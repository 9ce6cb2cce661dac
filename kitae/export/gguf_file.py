"""A GGUF file written as other exports are: tensor by tensor, resumable, whole or not there.

header (by the gguf package) + tensors, each made by rows --shards.write--> NAME.gguf.partial/ --rename--> NAME.gguf
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kitae.errors import GateError, MissingExtraError, ModelError, RunDirError
from kitae.export import blocks, gate, shards
from kitae.export.disk import os_errors
from kitae.export.folders import partial_of
from kitae.export.fp8 import require_finite
from kitae.export.gguf_types import PLAIN, Typed
from kitae.export.shards import Item, Pieces, Progress
from kitae.train.files import sync_folder
from kitae.train.folder import Lock

ALIGNMENT = 32
"""Bytes: where a tensor begins is a multiple of it."""
LARGEST_F16 = 65504.0
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Describe = Callable[[Any], None]
"""Writes metadata to a gguf.GGUFWriter."""


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor in the file."""

    name: str
    num_bytes: int
    """With the zeros up to where the next one may begin."""


@dataclass(frozen=True, slots=True)
class File:
    """What shards.write writes: the header, and where each tensor begins."""

    name: str
    items: list[Item[Output]]
    head: bytes
    places: dict[str, int]
    num_bytes: int

    def header(self) -> tuple[bytes, dict[str, int]]:
        return self.head, self.places


def require_gguf() -> Any:
    """The gguf package."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("GGUF files need the gguf package; pip install 'kitae[gguf]'")
    import gguf

    return gguf


def plan(name: str, architecture: str, tensors: Sequence[Typed], describe: Describe) -> File:
    """A file of these tensors in this order."""
    gguf = require_gguf()
    with TemporaryDirectory(prefix="kitae-gguf-") as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, architecture)
        describe(writer)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(
                tensor.target.name,
                tensor.target.shape,
                np.dtype(np.float32),  # is looked at where raw_dtype is None
                tensor.num_bytes,
                raw_dtype=kind,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = path.read_bytes()
    head += bytes(-len(head) % ALIGNMENT)
    places, at, items = {}, len(head), []
    for tensor in tensors:
        padded = tensor.num_bytes + -tensor.num_bytes % ALIGNMENT
        places[tensor.target.name] = at
        at += padded
        items.append(Item([Output(tensor.target.name, padded)], _maker(tensor)))
    items.sort(key=lambda item: -item.outputs[0].num_bytes)  # long ones first, so that no core waits for them
    return File(name, items, head, places, at)


def _maker(tensor: Typed) -> Callable[[], Pieces]:
    def pieces() -> Pieces:
        for x in tensor.target.pieces():
            yield 0, shards.as_bytes(as_kind(require_finite(x, name=tensor.target.name), tensor))
        yield 0, np.zeros(-tensor.num_bytes % ALIGNMENT, np.uint8)
        return False

    return pieces


def as_kind(x: Tensor, tensor: Typed) -> Tensor:
    """Float32 rows as the tensor's type stores them."""
    if tensor.kind not in PLAIN:
        return blocks.quantize(tensor.kind, x)
    if tensor.kind == "F16" and x.abs().max() > LARGEST_F16:
        raise ModelError(
            f"{tensor.target.name} has values beyond float16's largest, {LARGEST_F16:.0f}; use --type bf16 or q8_0"
        )
    return x.to(PLAIN_DTYPES[tensor.kind])


@contextlib.contextmanager
def prepare(output: Path, *, identity: Mapping[str, Any], overwrite: bool) -> Iterator[Path]:
    """The folder that a file is written in, locked; it goes when the file has its name.

    `overwrite` also empties it of another export that was stopped.
    """
    if output.is_dir():
        raise RunDirError(f"{output} is a folder; a GGUF export needs the name of a file, ending in .gguf")
    if output.exists() and not overwrite:
        raise RunDirError(f"{output} is there already; choose another --output, or say --overwrite")
    folder = partial_of(output)
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / "lock")
    try:
        if overwrite and shards.is_other(folder, identity):
            for path in folder.iterdir():
                if path.name != "lock":
                    path.unlink()
        yield folder
    finally:
        if folder.exists():
            (folder / "lock").unlink(missing_ok=True)
        lock.release()


def write(
    file: File,
    output: Path,
    *,
    identity: Mapping[str, Any],
    num_workers: int,
    overwrite: bool,
    progress: Progress,
    check: gate.Check | None,
) -> dict[str, Any] | None:
    """Write a file, give it its name when it is whole and has passed the check, and return that one's report."""
    with prepare(output, identity=identity, overwrite=overwrite) as folder:
        shards.write(folder, [file], identity=identity, num_workers=num_workers, progress=progress)
        return publish(folder, folder / file.name, output, check=check)


def publish(folder: Path, written: Path, output: Path, *, check: gate.Check | None) -> dict[str, Any] | None:
    """Give a whole file its name when it has passed the check, and remove the folder it was written in."""
    try:
        report = gate.examine(check, written, output)
    except GateError:
        shutil.rmtree(folder)
        raise
    with os_errors(output):
        gate.report_of(output).unlink(missing_ok=True)  # that of a file which had the name before
        written.replace(output)
        sync_folder(output.parent)
        if report is not None:
            gate.save(report, output)
        shutil.rmtree(folder)
    return report
