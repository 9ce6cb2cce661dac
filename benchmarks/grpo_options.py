"""The options that both sides of grpo.py are started with."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--folder", type=Path, required=True)
    made.add_argument("--precision", choices=["default", "float32", "bfloat16"], required=True)
    for count in ("prompts", "group", "longest", "steps", "warmup", "lora-rank"):
        made.add_argument(f"--{count}", type=int, required=True)
    return made
