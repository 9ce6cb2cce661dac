"""What TRL's sides of sft.py, dpo.py and grpo.py have in common. Settings not named here or there are TRL's defaults."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import Any


def settings(options: argparse.Namespace, *, folder: str, device: str, **own: Any) -> dict[str, Any]:
    """Arguments of a trainer's configuration; `own` are those that only one of the trainers has."""
    found = {
        "output_dir": str(options.folder / folder),
        "max_steps": options.steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        **own,
    }
    if options.precision != "default":
        found["bf16"] = options.precision == "bfloat16"
    if options.gradient_checkpointing is not None:
        found["gradient_checkpointing"] = options.gradient_checkpointing == "on"
    return found


def adapter(options: argparse.Namespace) -> Any:
    """The LoRA configuration; None trains all weights."""
    if not options.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear")


def rows(options: argparse.Namespace, file: str) -> Any:
    from datasets import load_dataset

    return load_dataset(
        "json",
        data_files=str(options.folder / file),
        split="train",
        cache_dir=str(options.folder / "hf"),
    )


def about(trainer: Any, config: Any) -> dict[str, Any]:
    """What is said of a run beside its numbers."""
    return {
        "precision": f"{next(trainer.model.parameters()).dtype} weights, bf16 autocast {config.bf16}",
        "gradient_checkpointing": config.gradient_checkpointing,
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "peft")},
    }
