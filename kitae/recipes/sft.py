"""Supervised fine-tuning: raise the probability of the demonstrated completion, token by token.

conversations --render--> rows --collate--> batches --cross-entropy--> gradient -> new weights
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kitae.config import (
    DataSettings,
    EvalSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    SaveSettings,
    Section,
    TrainSettings,
)

if TYPE_CHECKING:
    pass


class Settings(Section):
    """Supervised fine-tuning: full, LoRA (lora.rank > 0) or QLoRA (model.quantization = nf4)."""

    output_dir: str = "runs/sft"
    """The run's folder: final model at its top, checkpoints and logs beside it."""
    resume: bool = False
    """Go on from the newest complete checkpoint in output_dir."""
    overwrite: bool = False
    """Replace a run that is already in output_dir."""
    allow_inexact: bool = False
    """Resume although settings, data or machine differ from the interrupted run; the run is marked inexact."""
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    optim: OptimSettings = OptimSettings()
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings()
    log: LogSettings = LogSettings()
