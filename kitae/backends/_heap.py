"""The C library's heap of a training process on a CPU: freed memory is kept, in huge pages.

A training step allocates and frees the same large tensors again and again. glibc gives such memory back to the kernel,
which hands it out anew page by page, each page zeroed: nearly half of a small model's step. See mallopt(3), madvise(2).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt, from glibc's malloc.h."""
USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user sets these parameters; then they stay as they are."""


@functools.cache  # once: the heap is one
def keep_freed_memory(*, huge_pages_bytes: int) -> bool:
    """Let malloc keep what is freed for the next allocation, the first `huge_pages_bytes` of it in huge pages.

    The peak of resident memory stays about the same; it does not fall after it. False where this is not glibc's malloc
    on Linux, or where the user has set its parameters.
    """
    if sys.platform != "linux" or any(name in os.environ for name in USERS_OWN):
        return False
    libc = ctypes.CDLL(None)
    try:
        libc.mallopt, libc.malloc, libc.gnu_get_libc_version  # noqa: B018
    except AttributeError:  # another C library
        return False
    kept = libc.mallopt(M_MMAP_MAX, 0) == 1 and libc.mallopt(M_TRIM_THRESHOLD, -1) == 1
    _ask_for_huge_pages(libc, huge_pages_bytes)
    return bool(kept)


def _ask_for_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Grow the heap by `size` addresses, which take no memory until used, and mark them; where refused, it stays so."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(size)
    if start is None:
        return
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(first, (start + size - first) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    libc.free(start)
