"""Direct preference optimization: raise what was chosen above what was rejected, measured from where the model started.

    pairs --render--> [chosen, rejected] --reference--> ref_logprob --collate--> batches --DPO--> gradient -> new weights

Papers: arXiv:2305.18290 (DPO), arXiv:2310.12036 (IPO), arXiv:2403.00409 (robust DPO), arXiv:2404.19733 (the added NLL).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

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


class DPOSettings(Section):
    """The objective of DPO."""

    beta: float = Field(0.1, gt=0)
    """How dearly leaving the reference is paid for; larger keeps the model closer to it."""
    loss_type: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    """sigmoid is DPO as published, robust corrects for label_smoothing without bias, ipo stops at a margin of 1 / (2 beta)
    per token."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs you believe to be labelled the wrong way round; larger trusts the labels less."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the chosen completion's negative log-prob per token; larger keeps its probability from falling."""
    reference: Literal["auto", "cache", "each_step"] = "auto"
    """Where the starting model's log-probs come from: scored once and kept on disk (cache), or with the adapter off at every
    step (each_step); auto takes each_step for adapters, else cache."""


class Settings(RunSettings):
    """Direct preference optimization on chosen and rejected completions: full, LoRA or QLoRA."""

    output_dir: str = "runs/dpo"
    """The run's folder: final model at its top, checkpoints and logs beside it."""
    loss: str = ""
    """Your own loss instead, as file.py:function; see docs/recipes/custom-losses.md."""
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: PreferenceDataSettings = PreferenceDataSettings()
    dpo: DPOSettings = DPOSettings()
    train: PairTrainSettings = PairTrainSettings()
    optim: OptimSettings = OptimSettings(learning_rate=5e-7, warmup_ratio=0.1)
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings()
    log: LogSettings = LogSettings()


def train(cfg: Settings, setup: Setup) -> None:
    """Train on pairs; the step's result depends on pairs per step, not on how they are cut into passes."""
    from kitae.algos import preference
    from kitae.recipes._losses import chosen_loss
    from kitae.recipes._preference import held_out_evaluator, reference_of

    own_loss = partial(
        preference.dpo,
        beta=cfg.dpo.beta,
        loss_type=cfg.dpo.loss_type,
        label_smoothing=cfg.dpo.label_smoothing,
        nll_coef=cfg.dpo.nll_coef,
    )
    loss_fn = chosen_loss(cfg.loss, default=own_loss, produces=["ref_logprob"])
    pairs, held_out = setup.data.pairs(
        max_length=cfg.data.max_length, max_prompt_length=cfg.data.max_prompt_length
    )
    pairs_per_forward = cfg.train.per_device_train_batch_size
    pairs_per_step = pairs_per_forward * cfg.train.gradient_accumulation_steps * setup.world.world_size
    loader = setup.data.loader(pairs, items_per_step=pairs_per_step)
    total = setup.total_steps(steps_per_epoch=loader.steps_per_epoch)
    learner = setup.learner(total_steps=total)
    collate = partial(setup.collate, rows_per_forward=2 * pairs_per_forward, rows_per_unit=2)

    # Before step 1, while the weights are still those of the reference.
    reference = reference_of(setup, learner, cfg.dpo.reference, collate=collate)
    reference.prepare(pairs, loader.visited(total))
    if held_out is not None:
        reference.prepare(held_out, range(len(held_out)))
    evaluate = held_out_evaluator(
        setup, learner, held_out, own_loss, to_batches=collate, rows_per_item=2, reference=reference
    )

    for step in setup.steps(total, evaluate=evaluate):
        # 1. This rank's pairs of the step, chosen and rejected in turn; they share their prompt's computation.
        rows = [row for pair in loader.take() for row in pair]

        # 2. What the reference says of each completion.
        rows = reference.annotate(rows)
        batches = collate(rows)

        # 3. Gradient of the mean over the step's pairs, then update.
        metrics = setup.update(learner, batches, loss_fn, denominator=len(rows) / 2)
        setup.run.log(step, setup.train_metrics(metrics, batches))
