"""kitae: post-training for reasoning models that proves the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def train(recipe: str, settings: Mapping[str, Any] | None = None, *, file: str | Path | None = None) -> Path:
    """Train with a recipe, and return the run's folder, where the final model lies.

    Settings are nested (`{"optim": {"learning_rate": 1e-6}}`) or flat, and may use the flags of docs/flags.md without
    their dashes; they are laid over the TOML `file`. Example: kitae.train("sft", {"model_name_or_path": "my-model",
    "dataset_name": "rows.jsonl", "output_dir": "runs/first"}).
    """
    from kitae.cli.train import start

    return start(recipe, settings or {}, file=file)
