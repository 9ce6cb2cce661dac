"""CPUs: memory as the kernel and the control group see it, bfloat16 by instruction set."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitae.backends import Feature, Recording
from kitae.backends._heap import keep_freed_memory

FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Flags of /proc/cpuinfo (x86, x86, Arm) of CPUs that multiply bfloat16 matrices faster than float32."""

HUGE_PAGES_BYTES = 4 << 30
"""How much of a process's heap asks for huge pages; what is not used takes no memory."""


class CpuBackend:
    name = "cpu"
    process_group = "gloo"
    preference = 0
    tokens_per_forward: int | None = 2048

    def is_available(self) -> bool:
        return True

    def prepare(self) -> None:
        keep_freed_memory(huge_pages_bytes=HUGE_PAGES_BYTES)

    def count(self) -> int:
        return 1

    def supports(self, feature: Feature) -> tuple[bool, str]:
        if feature == "bfloat16":
            flags = _cpu_flags()
            found = next((flag for flag in FAST_BFLOAT16 if flag in flags), None)
            return (
                found is not None,
                f"this CPU has {found}" if found else "this CPU has no bfloat16 instructions",
            )
        if feature == "flex_attention":
            return False, "it has no backward pass on CPUs"
        if feature in ("triton", "recording"):
            return False, "it is for GPUs"
        if feature == "float8":
            return True, "torch casts to and from it"
        return feature == "nf4", "bitsandbytes runs on CPUs" if feature == "nf4" else "slow on CPUs"

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def memory(self, device: torch.device) -> tuple[int, int]:
        lines = _lines("/proc/meminfo")
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.split()[1].isdigit()}
        if not kib:  # not Linux: what the C library says
            import os

            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return total, total
        free, total = kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
        limit, used = _cgroup_bytes()
        return (free, total) if limit is None else (min(free, limit - used), min(total, limit))

    def peak_memory(self, device: torch.device) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def synchronize(self, device: torch.device) -> None:
        return

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def rng_state(self, device: torch.device) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        torch.set_rng_state(state)

    def record(self, work: Callable[[], Tensor], *, pool: Any = None) -> Recording:
        raise RuntimeError("this device cannot record work")


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def _cpu_flags() -> set[str]:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _cgroup_bytes() -> tuple[int | None, int]:
    """Memory limit of the control group (version 2) and what it uses beyond file caches; None without a limit."""
    folder = Path("/sys/fs/cgroup")
    limit = _lines(f"{folder}/memory.max")
    if not limit or limit[0] == "max":
        return None, 0
    used = int(_lines(f"{folder}/memory.current")[0])
    stat = dict(line.split() for line in _lines(f"{folder}/memory.stat"))
    return int(limit[0]), used - int(stat.get("inactive_file", 0))


BACKEND = CpuBackend()
