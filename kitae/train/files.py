"""Files that survive a kill at any instant: written aside and renamed, or appended one whole line at a time."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from kitae.errors import RunDirError


@contextmanager
def disk_errors(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Turn an operating system error about `path` into a RunDirError that says what to do.

    `needed`, in bytes, is named where the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise RunDirError(explain(error, path, needed=needed)) from error


def explain(error: OSError, path: Path, *, needed: int | None = None) -> str:
    """One line for an operating system error: what happened, where, and the remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(path)
        need = f"need {human(needed)}, " if needed is not None else ""
        have = f"have {human(free)}" if free is not None else "free space unknown"
        return f"disk full: {need}{have} at {path}; make space, then run the same command with --resume"
    remedy = {
        errno.EROFS: "the file system is read-only; choose another output_dir",
        errno.EACCES: "you may not write there; choose another output_dir or change its permissions",
        errno.EPERM: "you may not write there; choose another output_dir or change its permissions",
        errno.ENAMETOOLONG: "the name is too long; choose a shorter output_dir",
        errno.ELOOP: "a symbolic link points back to itself; remove it or choose another output_dir",
        errno.ENOTDIR: "part of the path is a file, not a folder; choose another output_dir",
        errno.EEXIST: "there is a file where a folder is needed; choose another output_dir",
    }.get(error.errno or 0, "check the disk, or choose another output_dir")
    return f"cannot write {path}: {error.strerror or error}; {remedy}"


def free_bytes(path: Path) -> int | None:
    """Free space where `path` is or will be; None where it cannot be told."""
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def human(size: int) -> str:
    """A size as people write it: 1536 -> "1.5 KiB"."""
    value, unit = float(size), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{size} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte; a short write goes on, so that a full disk raises instead of cutting the data."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_atomic(path: Path, data: bytes, *, is_durable: bool = True) -> None:
    """Replace `path` by `data` so that a reader, or a kill, sees the old content or the new, nothing else.

    is_durable also waits until the disk has it (power loss); leave it out for what is written every second.
    """
    aside = path.with_name(f".tmp-{path.name}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, data)
        if is_durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(aside, path)
    if is_durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder (what was created, renamed or removed there)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until the disk has every file below a folder, and the folders themselves."""
    for where, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(where) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(where))


def write_json(path: Path, value: Mapping[str, Any], *, is_durable: bool = True) -> None:
    """write_atomic for a JSON object, indented for people."""
    write_atomic(path, json.dumps(finite(value), indent=2).encode() + b"\n", is_durable=is_durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def content_hash(path: Path) -> str:
    """Hash of a file's content, read once from end to end."""
    hashed = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            hashed.update(part)
    return hashed.hexdigest()


def finite(value: Any) -> Any:
    """The same JSON value with NaN and infinities as null: they are no JSON, and browsers refuse them.

    Any: JSON values of every shape.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


class JsonLines:
    """An append-only file of one JSON object per line; a torn last line is cut off when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with disk_errors(path):
            self._descriptor = os.open(path, flags, 0o666)
            os.ftruncate(self._descriptor, _end_of_last_line(self._descriptor))

    def append(self, *records: Mapping[str, Any]) -> None:
        lines = "".join(json.dumps(finite(record), ensure_ascii=False) + "\n" for record in records)
        data = lines.encode("utf-8", errors="replace")
        with disk_errors(self.path):
            write_all(self._descriptor, data)

    def sync(self) -> int:
        """Wait until the disk has all lines; their size in bytes, to come back to with cut()."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)
            return os.fstat(self._descriptor).st_size

    def cut(self, size: int) -> None:
        """Drop what was appended after sync() returned `size`."""
        with disk_errors(self.path):
            os.ftruncate(self._descriptor, min(size, os.fstat(self._descriptor).st_size))

    def close(self) -> None:
        os.close(self._descriptor)


def _end_of_last_line(descriptor: int, *, block: int = 1 << 16) -> int:
    """Number of bytes up to and with the last line feed."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - block)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
