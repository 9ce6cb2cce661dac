"""Odds ratio preference optimization: SFT on the chosen completion and its odds above the rejected one's, in one stage.

    pairs --render--> [chosen, rejected] --collate--> batches --ORPO--> gradient -> new weights

Paper: arXiv:2403.07691.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from kitae.config import (
    EvalSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    PairTrainSettings,
    PreferenceDataSettings,
    RunSettings,
    SaveSettings,
    Section,
)

if TYPE_CHECKING:
    from kitae.recipes._setup import Setup


class ORPOSettings(Section):
    """The objective of ORPO."""

    odds_coef: float = Field(0.1, ge=0)
    """Weight of the log odds ratio beside the SFT term (lambda); larger separates chosen from rejected more."""


class Settings(RunSettings):
    """ORPO, SFT and preference in one stage without a reference model: full, LoRA or QLoRA."""

    output_dir: str = "runs/orpo"
    """The run's folder: final model at its top, checkpoints and logs beside it."""
    loss: str = ""
    """Your own loss instead, as file.py:function; see docs/recipes/custom-losses.md."""
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: PreferenceDataSettings = PreferenceDataSettings()
    orpo: ORPOSettings = ORPOSettings()
    train: PairTrainSettings = PairTrainSettings()
    optim: OptimSettings = OptimSettings(learning_rate=8e-6, warmup_ratio=0.1)
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings()
    log: LogSettings = LogSettings()


def train(cfg: Settings, setup: Setup) -> None:
    """Train on pairs; the step's result depends on pairs per step, not on how they are cut into passes."""
    from kitae.algos import preference
    from kitae.recipes._losses import chosen_loss
    from kitae.recipes._preference import held_out_evaluator

    own_loss = partial(preference.orpo, odds_coef=cfg.orpo.odds_coef)
    loss_fn = chosen_loss(cfg.loss, default=own_loss, produces=[])
    pairs, held_out = setup.data.pairs(
        max_length=cfg.data.max_length, max_prompt_length=cfg.data.max_prompt_length
    )
    pairs_per_forward = cfg.train.per_device_train_batch_size
    pairs_per_step = pairs_per_forward * cfg.train.gradient_accumulation_steps * setup.world.world_size
    loader = setup.data.loader(pairs, items_per_step=pairs_per_step)
    total = setup.total_steps(steps_per_epoch=loader.steps_per_epoch)
    learner = setup.learner(total_steps=total)
    collate = partial(setup.collate, rows_per_forward=2 * pairs_per_forward, rows_per_unit=2)
    evaluate = held_out_evaluator(setup, learner, held_out, own_loss, to_batches=collate, rows_per_item=2)

    for step in setup.steps(total, evaluate=evaluate):
        # 1. This rank's pairs of the step, chosen and rejected in turn; they share their prompt's computation.
        rows = [row for pair in loader.take() for row in pair]
        batches = collate(rows)

        # 2. Gradient of the mean over the step's pairs, then update.
        metrics = setup.update(learner, batches, loss_fn, denominator=len(rows) / 2)
        setup.run.log(step, setup.train_metrics(metrics, batches))
