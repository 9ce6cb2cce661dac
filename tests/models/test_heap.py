"""Freed memory stays with the process: tried in a process of its own, since the heap is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from kitae.backends._heap import keep_freed_memory
kept = keep_freed_memory(huge_pages_bytes=1 << 28)
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def fill():
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_freed_once_is_not_asked_of_the_kernel_again():
    def run(**env: str) -> tuple[bool, int]:
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, env=os.environ | env, check=True
        )
        kept, faults = done.stdout.split()
        return kept == "True", int(faults)

    kept, faults = run()
    if not kept:
        pytest.skip("another C library, or MALLOC_ variables are set")
    assert faults < 10
    own, faults = run(MALLOC_MMAP_THRESHOLD_="1000000")  # the user's own settings stay
    assert not own
    assert faults > 10
