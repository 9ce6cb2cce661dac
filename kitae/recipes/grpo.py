"""Group Relative Policy Optimization: sample a group of completions per prompt, reinforce the better ones.

    prompts -> rollouts -> rewards -> advantages -> rows -> batches -> loss -> gradient -> new weights

Papers: arXiv:2402.03300 (GRPO), arXiv:2501.12948 (rule rewards), arXiv:2503.14476 (DAPO), arXiv:2503.20783
(Dr. GRPO).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kitae.config import (
    DataSettings,
    EvalSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    RewardSettings,
    RolloutSettings,
    SaveSettings,
    Section,
    TrainSettings,
)

if TYPE_CHECKING:
    pass


class GRPOSettings(Section):
    """The objective of GRPO."""

    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 KL penalty to the reference model; 0 loads none."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """How far the ratio to the sampling policy may fall before its gradient is cut."""
    clip_high: float = Field(0.2, ge=0)
    """How far the ratio may rise; larger than clip_low explores more (DAPO)."""
    average: Literal["token", "sequence", "constant"] = "token"
    """What a step averages over: tokens (DAPO), completions (GRPO as published), or a constant (Dr. GRPO)."""
    scale_by_std: bool = True
    """Divide advantages by the group's standard deviation; false is Dr. GRPO."""


class Settings(Section):
    """GRPO with verifiable rewards: full or LoRA."""

    output_dir: str = "runs/grpo"
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
    rollout: RolloutSettings = RolloutSettings()
    reward: RewardSettings = RewardSettings()
    grpo: GRPOSettings = GRPOSettings()
    train: TrainSettings = TrainSettings()
    optim: OptimSettings = OptimSettings(learning_rate=1e-6, beta2=0.95)
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings(metric="eval/accuracy")
    log: LogSettings = LogSettings()
