"""The options that contenders of the training benchmarks have in common, whatever their interpreter."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser(
    description: str | None, *, counts: tuple[str, ...] = ("batch-size",), devices: tuple[str, ...] = ()
) -> argparse.ArgumentParser:
    """Model and rows, precision, and how much of what; `--device` where there is a choice."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--folder", type=Path, required=True)
    made.add_argument("--precision", choices=["default", "float32", "bfloat16"], required=True)
    for count in (*counts, "steps", "warmup", "lora-rank"):
        made.add_argument(f"--{count}", type=int, required=True)
    if devices:
        made.add_argument("--device", choices=devices, required=True)
    return made


def of_sft(
    description: str | None,
    *,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    quantizations: tuple[str, ...] = ("none", "nf4"),
) -> argparse.ArgumentParser:
    """Those of sft.py's contenders."""
    made = parser(description, devices=devices)
    made.add_argument("--max-length", type=int, required=True, help="tokens of the longest (packed) row")
    made.add_argument("--quantization", choices=quantizations, required=True, help="of the frozen weights")
    return made
