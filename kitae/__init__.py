"""kitae: post-training for reasoning models that proves the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from kitae import evaluate, export, train

__all__ = ["__version__", "evaluate", "export", "generate", "train"]
__version__ = "0.1.0"


class _Train(ModuleType):
    """The package kitae.train, which is also what one calls to train."""

    def __call__(
        self, recipe: str, settings: Mapping[str, Any] | None = None, *, file: str | Path | None = None
    ) -> Path:
        """Train with a recipe, and return the run's folder, where the final model lies.

        Settings are nested (`{"optim": {"learning_rate": 1e-6}}`) or flat, and may use the flags of docs/flags.md
        without their dashes; they are laid over the TOML `file`. Example: kitae.train("sft", {"model_name_or_path":
        "my-model", "dataset_name": "rows.jsonl", "output_dir": "runs/first"}).
        """
        from kitae.cli.train import start

        return start(recipe, settings or {}, file=file)


class _Evaluate(ModuleType):
    """The package kitae.evaluate, which is also what one calls to evaluate."""

    def __call__(self, model: str, dataset_name: str | Sequence[str], **settings: Any) -> dict[str, Any]:
        """Score a model on problems with gold answers; the settings are those of `kitae evaluate`.

        Returns the summary, such as accuracy with low and high; with perplexity=True loss and perplexity of the rows.
        """
        from kitae.cli.evaluate import from_python

        names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
        return from_python({"model": model, "dataset_name": names, **settings})


class _Export(ModuleType):
    """The package kitae.export, which is also what one calls to write a model anew."""

    def __call__(
        self, what: str, model: str | Path, output: str | Path | None = None, **settings: Any
    ) -> dict[str, Any]:
        """Write `output` as kitae export does: merge an adapter, gguf, fp8-to-bf16, or bf16-to-fp8; or verify candidates.

        Returns the report, with how many tensors changed or were converted, and the gate's under "verify".
        """
        from kitae.cli.export import from_python

        place = {} if output is None else {"output": str(output)}
        return from_python(what, {"model": str(model), **place, **settings})


def generate(model: str, prompts: str | Sequence[str], **settings: Any) -> list[str]:
    """Complete prompts; the settings are those of `kitae generate`.

    With n > 1 a prompt's completions follow each other.
    """
    from kitae.cli.generate import completions

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    return completions({"model": model, "prompt": texts, **settings})


# A function of these names would be shadowed by the packages once they are imported, so the packages are callable.
train.__class__ = _Train
evaluate.__class__ = _Evaluate
export.__class__ = _Export
