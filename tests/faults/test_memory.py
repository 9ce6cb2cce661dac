"""Kernels that find no memory say so, wherever it happens, and the process goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def test_an_allocation_that_fails_in_a_kernel_is_an_error_and_ends_nothing(kernels, tiny, tmp_path: Path):
    compiler, library = shutil.which("g++"), tmp_path / "failing_new.so"
    if compiler is None:
        pytest.skip("no g++")
    here = Path(__file__).parent
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", here / "failing_new.cpp", "-o", library],
        check=True,
    )
    folders = [tiny(), tiny("deepseek_v3")]
    done = subprocess.run(
        [sys.executable, here / "fault_memory.py", *folders],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    assert len(done.stdout.splitlines()) == 14, done.stdout
