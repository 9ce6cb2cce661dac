"""Supervised fine-tuning: raise the probability of the demonstrated completion, token by token.

conversations --render--> rows --collate--> batches --cross-entropy--> gradient -> new weights
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kitae.config import (
    BatchTrainSettings,
    DataSettings,
    EvalSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    SaveSettings,
)

if TYPE_CHECKING:
    from kitae.recipes._setup import Setup


class Settings(RunSettings):
    """Supervised fine-tuning: full, LoRA (lora.rank > 0) or QLoRA (model.quantization = nf4)."""

    output_dir: str = "runs/sft"
    """The run's folder: final model at its top, checkpoints and logs beside it."""
    loss: str = ""
    """Your own loss instead, as file.py:function; see docs/recipes/custom-losses.md."""
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    train: BatchTrainSettings = BatchTrainSettings()
    optim: OptimSettings = OptimSettings()
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings()
    log: LogSettings = LogSettings()


def train(cfg: Settings, setup: Setup) -> None:
    """Train on rendered rows; the step's result depends on rows per step, not on how they are cut into passes."""
    from kitae.algos import averaging, losses
    from kitae.recipes._losses import chosen_loss

    loss_fn = chosen_loss(cfg.loss, default=losses.cross_entropy, produces=[])
    rows, held_out = setup.data.rendered_rows(max_length=cfg.data.max_length)
    rows_per_forward = cfg.train.per_device_train_batch_size
    rows_per_step = rows_per_forward * cfg.train.gradient_accumulation_steps * setup.world.world_size
    loader = setup.data.loader(rows, items_per_step=rows_per_step)
    total = setup.total_steps(steps_per_epoch=loader.steps_per_epoch)
    learner = setup.learner(total_steps=total)

    for step in setup.steps(total, evaluate=setup.loss_evaluator(learner, held_out)):
        # 1. This rank's rows of the step. An item is one conversation; its template may cut it into several rows.
        taken = [row for item in loader.take() for row in item]

        # 2. One denominator for the whole step, whatever the forward passes and ranks.
        weighed, denominator = averaging.weigh(taken, cfg.train.average)
        batches = setup.collate(weighed, rows_per_forward=rows_per_forward)

        # 3. Gradient, then update.
        metrics = setup.update(learner, batches, loss_fn, denominator=denominator)
        setup.run.log(step, setup.train_metrics(metrics, batches))
