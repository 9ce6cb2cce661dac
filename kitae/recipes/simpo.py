"""Simple preference optimization: the chosen completion's mean log-prob above the rejected one's by a margin, no reference.

    pairs --render--> [chosen, rejected] --collate--> batches --SimPO--> gradient -> new weights

Paper: arXiv:2405.14734.
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


class SimPOSettings(Section):
    """The objective of SimPO."""

    beta: float = Field(2.0, gt=0)
    """Scale of the rewards, which are beta x mean log-prob per token; larger is satisfied by smaller differences."""
    gamma: float = Field(1.0, ge=0)
    """Margin by which the chosen reward is to win; larger pushes further. The paper takes 0.3 to 0.5 of beta."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs you believe to be labelled the wrong way round; larger trusts the labels less."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the chosen completion's negative log-prob per token; larger keeps its probability from falling."""


class Settings(RunSettings):
    """SimPO on chosen and rejected completions, without a reference model: full, LoRA or QLoRA."""

    output_dir: str = "runs/simpo"
    """The run's folder: final model at its top, checkpoints and logs beside it."""
    loss: str = ""
    """Your own loss instead, as file.py:function; see docs/recipes/custom-losses.md."""
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: PreferenceDataSettings = PreferenceDataSettings()
    simpo: SimPOSettings = SimPOSettings()
    train: PairTrainSettings = PairTrainSettings()
    optim: OptimSettings = OptimSettings(learning_rate=5e-7, warmup_ratio=0.1)
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings()
    log: LogSettings = LogSettings()


def train(cfg: Settings, setup: Setup) -> None:
    """Train on pairs; the step's result depends on pairs per step, not on how they are cut into passes."""
    from kitae.algos import preference
    from kitae.recipes._losses import chosen_loss
    from kitae.recipes._preference import held_out_evaluator

    own_loss = partial(
        preference.simpo,
        beta=cfg.simpo.beta,
        gamma=cfg.simpo.gamma,
        label_smoothing=cfg.simpo.label_smoothing,
        nll_coef=cfg.simpo.nll_coef,
    )
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
