"""Kahneman-Tversky optimization: completions that are only good or bad each, no pairs needed.

    labelled completions --render--> [own, mismatched] --reference--> ref_logprob
        mismatched --no gradient--> reference point
        own --collate--> batches --KTO--> gradient -> new weights

Paper: arXiv:2402.01306.
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


class KTOSettings(Section):
    """The objective of KTO."""

    beta: float = Field(0.1, gt=0)
    """How dearly leaving the reference is paid for; larger keeps the model closer to it."""
    desirable_weight: float = Field(1.0, ge=0)
    """Weight of good completions. With n good and m bad ones, the paper wants weight x n between 1 and 4/3 of the other's
    weight x m."""
    undesirable_weight: float = Field(1.0, ge=0)
    """Weight of bad completions; larger fears losses more."""
    reference: Literal["auto", "cache", "each_step"] = "auto"
    """Where the starting model's log-probs come from: scored once and kept on disk (cache), or with the adapter off at every
    step (each_step); auto takes each_step for adapters, else cache."""


class Settings(RunSettings):
    """KTO on completions labelled good or bad (pairs are taken too): full, LoRA or QLoRA."""

    output_dir: str = "runs/kto"
    """The run's folder: final model at its top, checkpoints and logs beside it."""
    loss: str = ""
    """Your own loss instead, as file.py:function; see docs/recipes/custom-losses.md."""
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: PreferenceDataSettings = PreferenceDataSettings()
    kto: KTOSettings = KTOSettings()
    train: PairTrainSettings = PairTrainSettings()
    optim: OptimSettings = OptimSettings(learning_rate=5e-7, warmup_ratio=0.1)
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings()
    log: LogSettings = LogSettings()


def train(cfg: Settings, setup: Setup) -> None:
    """Train on labelled completions; a step's result depends on rows per step, not on how they are cut into passes."""
    from kitae.algos import preference
    from kitae.recipes._losses import chosen_loss
    from kitae.recipes._preference import at_reference_point, held_out_evaluator, reference_of

    own_loss = partial(
        preference.kto,
        beta=cfg.kto.beta,
        desirable_weight=cfg.kto.desirable_weight,
        undesirable_weight=cfg.kto.undesirable_weight,
    )
    loss_fn = chosen_loss(cfg.loss, default=own_loss, produces=["label", "ref_logprob", "reference_point"])
    items, held_out = setup.data.labelled(
        max_length=cfg.data.max_length, max_prompt_length=cfg.data.max_prompt_length
    )
    rows_per_forward = cfg.train.per_device_train_batch_size
    rows_per_step = rows_per_forward * cfg.train.gradient_accumulation_steps * setup.world.world_size
    loader = setup.data.loader(items, items_per_step=rows_per_step)
    total = setup.total_steps(steps_per_epoch=loader.steps_per_epoch)
    learner = setup.learner(total_steps=total)
    collate = partial(setup.collate, rows_per_forward=rows_per_forward)
    to_batches = partial(at_reference_point, learner=learner, collate=collate)

    # Before step 1, while the weights are still those of the reference.
    reference = reference_of(setup, learner, cfg.kto.reference, collate=collate)
    reference.prepare(items, loader.visited(total))
    if held_out is not None:
        reference.prepare(held_out, range(len(held_out)))
    evaluate = held_out_evaluator(
        setup, learner, held_out, own_loss, to_batches=to_batches, rows_per_item=1, reference=reference
    )

    for step in setup.steps(total, evaluate=evaluate):
        # 1. This rank's completions of the step; behind each its prompt with another prompt's completion.
        rows = [row for item in loader.take() for row in item]

        # 2. What the reference says of both, and from the second kind the step's reference point, without gradient.
        batches = to_batches(reference.annotate(rows))

        # 3. Gradient of the mean over the step's completions, then update.
        metrics = setup.update(learner, batches, loss_fn, denominator=len(rows) / 2)
        setup.run.log(step, setup.train_metrics(preference.per_side(metrics), batches))
