"""The disk an export is written to: its errors in one line, and writing that begins before it is waited for."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from kitae.errors import RunDirError
from kitae.train.files import free_bytes, human

SYNC_FILE_RANGE_WRITE = 2
"""Of Linux: begin to write, and do not wait."""
_C = ctypes.CDLL(None)


def explain(error: OSError, path: Path) -> str:
    """One line for an operating system error while an export is written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(path)
        have = f" ({human(free)} left)" if free is not None else ""
        return f"disk full{have} at {path}; make space, then give the same command again, which goes on there"
    return f"cannot write {error.filename or path}: {error.strerror or error}; choose another --output"


@contextmanager
def os_errors(path: Path) -> Generator[None, None, None]:
    """Turn an operating system error about an export into one line."""
    try:
        yield
    except OSError as error:
        raise RunDirError(explain(error, path)) from error


def send_to_disk(descriptor: int, offset: int, size: int) -> None:
    """Let the kernel begin to write a part of a file, so that fsync finds little left to wait for.

    It is a hint, and does nothing where the C library has no sync_file_range.
    """
    begin = getattr(_C, "sync_file_range", None)
    if begin is not None:
        begin(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)
