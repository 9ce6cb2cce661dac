"""Compile C++ kernels when they are first needed, and keep them for every later run of this machine.

    kernels/*.cpp, *.h --g++--> ~/.cache/kitae/kernels/<hash>.so --ctypes--> functions

The hash is of the sources, the compiler, its flags, torch's version and the CPU: a home folder shared by different
machines holds a file for each. No header of torch or Python is used, so compiling takes a few seconds.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]
COMPILERS = ("g++", "c++")
TIMEOUT_S = 300
OUT_OF_MEMORY = -1
"""As in rollout/kernels/memory.h."""


class BuildError(Exception):
    """There are no kernels on this machine; its text says why, as the end of a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """C++ that becomes one library."""

    main: Path
    """The file that is compiled; it includes the others."""
    folders: Sequence[Path]
    """Where it and all it includes lie."""
    functions: Sequence[str]
    """Some that the library must have."""
    purpose: str
    """What its kernels are called in the log, such as rollout."""


def load_library(source: Source, *, cache: Path | None = None) -> ctypes.CDLL:
    """The compiled library, from `cache` (default: kitae/kernels in the user's cache) or compiled now."""
    runtime = openmp_runtime()
    compiler = find_compiler()
    folder = cache or default_cache()
    file = folder / f"{fingerprint(source, compiler, runtime)}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{file.stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second finds the file
            if (loaded := _load(file, source.functions)) is not None:
                return loaded
            log.info("compiling the %s kernels with %s, once for this machine", source.purpose, compiler)
            began = time.perf_counter()
            compile_kernels(file, main=source.main, compiler=compiler, runtime=runtime)
            _checksum_file(file).write_text(_checksum(file))
            took = time.perf_counter() - began
            log.info("compiled the %s kernels in %.1f s: %s", source.purpose, took, file)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written ({error})") from error
    if (loaded := _load(file, source.functions)) is None:
        raise BuildError(f"what {compiler} made of the kernels cannot be loaded")
    return loaded


def status_of(status: int, function: Any, arguments: tuple[Any, ...]) -> int:
    """What a kernel returned, if it found enough memory to work in: `errcheck` of ctypes functions."""
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"{function.__name__} found no memory to work in")
    return status


def default_cache() -> Path:
    """Where compiled kernels lie: $XDG_CACHE_HOME/kitae/kernels, or ~/.cache/kitae/kernels."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "kitae" / "kernels"
    except RuntimeError as error:
        raise BuildError("there is no home folder to keep them in; set XDG_CACHE_HOME") from error


def find_compiler() -> str:
    """$CXX, or the first of COMPILERS there is."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        if found := shutil.which(name):
            return found
    raise BuildError(f"there is no C++ compiler ({wanted or ' or '.join(COMPILERS)})")


def openmp_runtime() -> str:
    """File of the OpenMP runtime that torch has loaded; a second one in the process would compete for the cores."""
    torch.get_num_threads()  # it is loaded by now
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError as error:
        raise BuildError("only Linux says which OpenMP runtime torch uses") from error
    found: list[str] = sorted(
        set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)$", mapped, re.MULTILINE))
    )
    own = [path for path in found if f"{Path(torch.__file__).parent}" in path]  # torch/lib or torch.libs
    if len(own or found) != 1:
        raise BuildError(f"{len(own or found)} OpenMP runtimes are loaded, and the kernels need torch's")
    return (own or found)[0]


def fingerprint(source: Source, compiler: str, runtime: str) -> str:
    """Name of the file that these kernels, this compiler and this CPU give."""
    digest = blake2b(digest_size=12)
    for path in (source.main, *(path for folder in source.folders for path in sorted(folder.glob("*.h")))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    about = [compiler, _version(compiler), *FLAGS, runtime, torch.__version__, cpu_features()]
    digest.update("\0".join(about).encode())
    return digest.hexdigest()


def cpu_features() -> str:
    """What -march=native looks at."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    names = ("model name", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(names)}))


def compile_kernels(file: Path, *, main: Path, compiler: str, runtime: str) -> None:
    """Compile `main` into `file`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="building-") as folder:
        half, whole = Path(folder) / "half.o", Path(folder) / "whole.so"
        _run([compiler, *FLAGS, "-c", str(main), "-o", str(half)])
        # Linked without -fopenmp, which would bring the compiler's own runtime.
        _run([compiler, "-shared", str(half), runtime, "-o", str(whole)])
        whole.replace(file)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not work ({error})") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"{command[0]} cannot compile them: {' '.join(lines[:1])}")


def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} does not work ({error})") from error
    return done.stdout.decode(errors="replace")


def _load(file: Path, functions: Sequence[str]) -> ctypes.CDLL | None:
    """The library, or None where the file is missing or damaged: loading half a library kills the process."""
    try:
        if _checksum_file(file).read_text() != _checksum(file):
            return None
    except OSError:
        return None
    try:
        loaded = ctypes.CDLL(str(file))
        _ = [getattr(loaded, name) for name in functions]
    except (OSError, AttributeError):
        return None
    return loaded


def _checksum_file(file: Path) -> Path:
    return file.with_suffix(".checksum")


def _checksum(file: Path) -> str:
    return blake2b(file.read_bytes(), digest_size=16).hexdigest()
