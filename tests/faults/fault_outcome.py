"""What a run came to, to the last bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kitae.train.metrics import read_metrics


def numbers(folder: Path) -> list[tuple]:
    """Every line's step and numbers that do not measure time, as hex floats."""
    return [
        (line["step"], *(f"{name}={value.hex()}" for name, value in sorted(line.items()) if is_exact(name)))
        for line in read_metrics(folder)
    ]


def is_exact(name: str) -> bool:
    return name.startswith(("train/", "eval/"))


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
