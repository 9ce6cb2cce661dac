"""What the bits of a run's result depend on: settings, machine, data. Compared when a run is resumed."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from kitae.compiler import cpu_features
from kitae.parallel.world import World
from kitae.settings import compare

UNCOMPARED = ("output_dir", "resume", "overwrite", "allow_inexact", "save", "log", "eval")
"""Settings that may differ on resume: they change where and what is written, not the numbers."""
PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors")


def identity(*, settings: Mapping[str, Any], facts: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Everything that must be equal for a resumed run to continue to the last bit."""
    compared = {name: value for name, value in settings.items() if name not in UNCOMPARED}
    return {"settings": compared, "machine": machine(world), "facts": dict(facts)}


def machine(world: World) -> dict[str, Any]:
    """What decides the order and kind of floating-point operations."""
    device = world.device
    found = {
        "world_size": world.world_size,
        "threads": torch.get_num_threads(),
        "device": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type,
        "torch": torch.__version__,
    }
    return found | ({"cpu": cpu()} if device.type == "cpu" else {})


def cpu() -> str:
    """The CPU's name, and a hash of what kernels are chosen by: `AMD EPYC 9R14, features 5c1e07aa`."""
    features = cpu_features()
    names = [
        line.partition(":")[2].strip() for line in features.splitlines() if line.startswith("model name")
    ]
    digest = blake2b(features.encode(), digest_size=4).hexdigest()
    return f"{names[0] if names else platform.machine()}, features {digest}"


def versions() -> dict[str, str | None]:
    """Installed versions of the packages a run's numbers come from; recorded, not compared."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: installed(package) for package in PACKAGES}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Fields in which two identities differ, such as "train.seed 1 -> 2"."""
    before, after = (compare.flat(json.loads(json.dumps(table))) for table in (then, now))
    return list(compare.differences(before, after).values())
