"""The native engine's kernels, compiled when they are first needed (compiler.py)."""

from __future__ import annotations

import ctypes
from pathlib import Path

from kitae.compiler import BuildError, Source, load_library

__all__ = ["BuildError", "load_kernels"]
KERNELS = Path(__file__).parent / "kernels"
SOURCE = Source(
    main=KERNELS / "engine.cpp",
    folders=[KERNELS],
    functions=["kitae_decode", "kitae_forward", "kitae_sample"],
    purpose="rollout",
)


def load_kernels(*, cache: Path | None = None) -> ctypes.CDLL:
    """The compiled kernels, from `cache` (default: kitae/kernels in the user's cache) or compiled now."""
    return load_library(SOURCE, cache=cache)
