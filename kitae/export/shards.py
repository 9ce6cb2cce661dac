"""Writes safetensors shards that are whole or not there, and goes on where a killed process stopped.

NAME.partial/.tmp-SHARD --fsync, rename--> NAME.partial/SHARD --manifest, fsync--> ... --all done--> NAME

A shard counts once the manifest has its hash, which is taken from the bytes in memory, tensor by tensor, so that
tensors are written side by side in any order. A second start reads finished shards and checks them against it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock as Mutex
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from kitae.errors import RunDirError
from kitae.export.disk import explain, os_errors, send_to_disk
from kitae.models.files import ELEMENT_BITS
from kitae.train.files import free_bytes, human, read_json, sync_folder, write_json

MANIFEST = "kitae_export.json"
FORMAT = 1
IN_FLIGHT = 2
"""Shards at a time: while one is waiting for the disk, the cores work on the next."""
READ_BYTES = 1 << 24
SENT_BYTES = 1 << 24
"""Of a tensor that are sent on their way to the disk at a time, while the next ones are computed."""
SPARE_BYTES = 1 << 24

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Pieces = Generator[tuple[int, Bytes], None, bool]
"""(which of the item's outputs, its next bytes), and at the end whether it differs from what was read."""


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        size = ELEMENT_BITS[self.dtype] // 8
        for n in self.shape:
            size *= n
        return size


class Named(Protocol):
    """A tensor to be written, of any format."""

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...


class Written(Protocol):
    """A file to be written, of any format: a Shard of safetensors, or a GGUF file."""

    @property
    def name(self) -> str: ...

    @property
    def items(self) -> Sequence[Item[Any]]: ...

    @property
    def num_bytes(self) -> int: ...

    def header(self) -> tuple[bytes, dict[str, int]]:
        """The file's first bytes, and where in it each tensor begins."""
        ...


NamedT = TypeVar("NamedT", bound=Named)


@dataclass(frozen=True, slots=True)
class Item(Generic[NamedT]):
    """Tensors that are made together, such as an FP8 weight and its scales."""

    outputs: list[NamedT]
    pieces: Callable[[], Pieces]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of safetensors."""

    name: str
    items: list[Item[Output]]

    def header(self) -> tuple[bytes, dict[str, int]]:
        """The file's first bytes, and where in it each tensor begins: wide types first, so that all are aligned."""
        outputs = [output for item in self.items for output in item.outputs]
        outputs.sort(key=lambda o: (-ELEMENT_BITS[o.dtype], o.name))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, at = {}, 0
        for output in outputs:
            offsets[output.name] = at
            at += output.num_bytes
            entries[output.name] = {
                "dtype": output.dtype,
                "shape": list(output.shape),
                "data_offsets": [offsets[output.name], at],
            }
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        return struct.pack("<Q", len(text)) + text, {name: start + offset for name, offset in offsets.items()}

    @property
    def num_bytes(self) -> int:
        return len(self.header()[0]) + sum(o.num_bytes for item in self.items for o in item.outputs)


def _ignore(_: int) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is told while shards are written, from several threads."""

    begin: Callable[[int], None] = _ignore
    """Gets the bytes of all shards."""
    say: Callable[[int], None] = _ignore
    """Gets the bytes done since the last call."""


def as_bytes(tensor: Tensor) -> Bytes:
    """A tensor's bytes as safetensors wants them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()


def write(
    folder: Path,
    shards: Sequence[Written],
    *,
    identity: Mapping[str, Any],
    num_workers: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Write all shards into a folder of the caller's, and return the manifest's entry of each.

    A folder that an earlier start with the same `identity` left is gone on with; another one is refused.
    """
    done = _finished(folder, shards, identity=identity)
    # In the pool's threads, so that each tensor takes one core; the setting is the whole process's.
    threads_before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))
    outer = ThreadPoolExecutor(IN_FLIGHT)
    mutex = Mutex()

    def finish(shard: Written) -> None:
        if shard.name in done:
            if _digest_of(folder / shard.name, shard, pool, progress) == done[shard.name]["xxh3_128"]:
                return
            with mutex:  # what a disk damaged is written again
                del done[shard.name]
        entry = _write_shard(folder, shard, pool, progress)
        with mutex:
            done[shard.name] = entry
            _write_manifest(folder, identity, done)

    try:
        _require_space(folder, [s for s in shards if s.name not in done])
        progress.begin(sum(shard.num_bytes for shard in shards))
        for _ in outer.map(finish, shards):
            pass
    except OSError as error:
        raise RunDirError(explain(error, folder)) from error
    finally:
        outer.shutdown(cancel_futures=True, wait=False)
        pool.shutdown(cancel_futures=True)
        outer.shutdown()
        torch.set_num_threads(threads_before)
    return {shard.name: done[shard.name] for shard in shards}


def is_other(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder holds finished files of another export."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None or not manifest["shards"]:
        return False
    return bool(manifest["identity"] != json.loads(json.dumps(dict(identity))))


def is_finished(path: Path, *, identity: Mapping[str, Any]) -> bool:
    """Whether `finish` gave a file its place for this export, and it is as it was."""
    manifest = read_json(path.parent / MANIFEST)
    if manifest is None or is_other(path.parent, identity) or not path.is_file():
        return False
    entry = manifest["shards"].get(path.name)
    with os_errors(path):
        return entry is not None and _digest_of_file(path) == entry["xxh3_128"]


def finish(aside: Path, path: Path, *, identity: Mapping[str, Any]) -> None:
    """Give a file that another program wrote its place in an export's folder, and note its hash there."""
    with os_errors(path):
        descriptor = os.open(aside, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        entry = {"bytes": aside.stat().st_size, "xxh3_128": _digest_of_file(aside)}
        os.rename(aside, path)
        sync_folder(path.parent)
        _write_manifest(path.parent, identity, {path.name: entry})


def _digest_of_file(path: Path) -> str:
    hashed = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as stream:
        while part := stream.read(READ_BYTES):
            hashed.update(part)
    return hashed.hexdigest()


def _finished(
    folder: Path, shards: Sequence[Written], *, identity: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Entries of shards that an earlier start finished; leftovers of half a shard are removed."""
    known = {shard.name: shard.num_bytes for shard in shards}
    manifest = read_json(folder / MANIFEST) or {"identity": dict(identity), "shards": {}}
    if is_other(folder, identity):
        raise RunDirError(
            f"{folder} holds half of another export (other settings, or files that changed since); remove that "
            "folder, or choose another --output"
        )
    with os_errors(folder):
        for path in folder.glob(".tmp-*"):
            path.unlink()
        _write_manifest(folder, identity, manifest["shards"])
    return {
        name: entry
        for name, entry in manifest["shards"].items()
        if (folder / name).is_file() and (folder / name).stat().st_size == known.get(name)
    }


def _write_manifest(folder: Path, identity: Mapping[str, Any], done: Mapping[str, Any]) -> None:
    write_json(folder / MANIFEST, {"format": FORMAT, "identity": dict(identity), "shards": dict(done)})


def _require_space(folder: Path, shards: Sequence[Written]) -> None:
    needed = sum(shard.num_bytes for shard in shards) + SPARE_BYTES
    free = free_bytes(folder)
    if shards and free is not None and free < needed:
        raise RunDirError(
            f"disk too small: need {human(needed)}, have {human(free)} at {folder}; make space, or choose another "
            "--output"
        )


def _write_shard(
    folder: Path, shard: Written, pool: ThreadPoolExecutor, progress: Progress
) -> dict[str, Any]:
    header, offsets = shard.header()
    aside = folder / f".tmp-{shard.name}"
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    digests: dict[str, bytes] = {}

    def make(item: Item[Any]) -> bool:
        pieces = item.pieces()
        ends = [offsets[output.name] for output in item.outputs]
        sent = list(ends)
        hashes = [xxhash.xxh3_128() for _ in item.outputs]
        while True:
            try:
                which, data = next(pieces)
            except StopIteration as stop:
                is_changed = bool(stop.value)
                break
            _write_at(descriptor, data.data, ends[which])
            hashes[which].update(data.data)
            ends[which] += len(data)
            if ends[which] - sent[which] >= SENT_BYTES:
                send_to_disk(descriptor, sent[which], ends[which] - sent[which])
                sent[which] = ends[which]
            progress.say(len(data))
        for output, end, digest in zip(item.outputs, ends, hashes, strict=True):
            assert end == offsets[output.name] + output.num_bytes, (output, end)
            digests[output.name] = digest.digest()
        return is_changed

    try:
        _write_at(descriptor, header, 0)
        futures = [pool.submit(make, item) for item in shard.items]
        try:
            changed = sum(future.result() for future in futures)
        finally:
            for future in futures:
                future.cancel()
            for future in futures:  # nobody writes to a descriptor that is closed
                if not future.cancelled():
                    future.exception()
        os.fsync(descriptor)
        os.rename(aside, folder / shard.name)
    except BaseException:
        aside.unlink(missing_ok=True)  # on a full disk, half a shard only takes space
        raise
    finally:
        os.close(descriptor)
    sync_folder(folder)
    return {
        "bytes": shard.num_bytes,
        "xxh3_128": _combined(header, offsets, digests),
        "changed": changed,
    }


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _combined(header: bytes, offsets: Mapping[str, int], digests: Mapping[str, bytes]) -> str:
    """Hash of a file: of its header, and of the hash of each tensor in the file's order."""
    combined = xxhash.xxh3_128(header)
    for name in sorted(offsets, key=lambda n: (offsets[n], n)):
        combined.update(digests[name])
    return combined.hexdigest()


def _digest_of(path: Path, shard: Written, pool: ThreadPoolExecutor, progress: Progress) -> str:
    """The same hash from a file that is there."""
    header, offsets = shard.header()
    sizes = {o.name: o.num_bytes for item in shard.items for o in item.outputs}
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def digest(name: str) -> bytes:
        hashed, at, end = xxhash.xxh3_128(), offsets[name], offsets[name] + sizes[name]
        while at < end and (part := os.pread(descriptor, min(READ_BYTES, end - at), at)):
            hashed.update(part)
            at += len(part)
            progress.say(len(part))
        return hashed.digest()

    try:
        found = os.pread(descriptor, len(header), 0)
        futures = {name: pool.submit(digest, name) for name in offsets}
        digests = {name: future.result() for name, future in futures.items()}
    finally:
        os.close(descriptor)
    return _combined(found, offsets, digests)
