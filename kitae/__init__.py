"""kitae: post-training for reasoning models that proves the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def evaluate(model: str, dataset_name: str | Sequence[str], **settings: Any) -> dict[str, Any]:
    """Score a model on problems with gold answers; the settings are those of `kitae evaluate`.

    Returns the summary, such as accuracy with low and high; with perplexity=True the loss and perplexity of the rows.
    """
    from kitae.cli.evaluate import from_python

    names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
    return from_python({"model": model, "dataset_name": names, **settings})


def generate(model: str, prompts: str | Sequence[str], **settings: Any) -> list[str]:
    """Complete prompts; the settings are those of `kitae generate`. With n > 1 a prompt's completions follow each other."""
    from kitae.cli.generate import completions

    return completions(
        {"model": model, "prompt": [prompts] if isinstance(prompts, str) else list(prompts), **settings}
    )
