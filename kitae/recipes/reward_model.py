"""A reward model: learn from pairs which completion people prefer, as one number per completion.

    pairs --render--> [chosen, rejected] --one more token--> rows --critic--> scores --Bradley-Terry--> new weights

Papers: arXiv:2203.02155 (InstructGPT), arXiv:2307.09288 (margins), arXiv:2312.09244 (centred scores),
arXiv:1706.04599 (calibration). The result is a reward by its path: reward.function = "runs/reward_model".
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
    require,
)

if TYPE_CHECKING:
    from kitae.recipes._setup import Setup


class RewardModelSettings(Section):
    """The objective of a reward model."""

    center_coef: float = Field(0.0, ge=0)
    """Weight of the squared sum of a pair's two scores; larger holds the mean score nearer to 0. 0.01 is a usual value."""
    margin_column: str = ""
    """Column of the data with each pair's margin, a number that the chosen score must lead by; larger for clearer pairs.
    Empty: no margins."""


class Settings(RunSettings):
    """A reward model from chosen and rejected completions (Bradley-Terry): full, LoRA or QLoRA."""

    output_dir: str = "runs/reward_model"
    """The run's folder: final model at its top, checkpoints and logs beside it."""
    loss: str = ""
    """Your own loss instead, as file.py:function; see docs/recipes/custom-losses.md."""
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: PreferenceDataSettings = PreferenceDataSettings()
    reward_model: RewardModelSettings = RewardModelSettings()
    train: PairTrainSettings = PairTrainSettings()
    optim: OptimSettings = OptimSettings(learning_rate=1e-5, warmup_ratio=0.03)
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings(metric="eval/accuracy")
    log: LogSettings = LogSettings()


def train(cfg: Settings, setup: Setup) -> None:
    """Train on pairs; the step's result depends on pairs per step, not on how they are cut into passes."""
    from kitae.algos.reward_model import bradley_terry
    from kitae.models.critic import load_critic
    from kitae.recipes._losses import chosen_loss
    from kitae.recipes._reward_model import choose_padding, pair_evaluator, with_end

    margin_column = cfg.reward_model.margin_column
    own_loss = partial(bradley_terry, center_coef=cfg.reward_model.center_coef)
    loss_fn = chosen_loss(cfg.loss, default=own_loss, produces=["margin"] if margin_column else [])
    require(
        not getattr(loss_fn, "needs_entropy", False),
        f"loss {cfg.loss} asks for entropy, which a reward model has not: it gives scores, not words",
    )
    pairs, held_out = setup.data.pairs(
        max_length=cfg.data.max_length,
        max_prompt_length=cfg.data.max_prompt_length,
        margin_column=margin_column,
    )
    pairs_per_forward = cfg.train.per_device_train_batch_size
    pairs_per_step = pairs_per_forward * cfg.train.gradient_accumulation_steps * setup.world.world_size
    loader = setup.data.loader(pairs, items_per_step=pairs_per_step)
    total = setup.total_steps(steps_per_epoch=loader.steps_per_epoch)
    learner = setup.learner(total_steps=total, load=load_critic)
    choose_padding(learner.policy, setup.template)

    for step in setup.steps(total, evaluate=pair_evaluator(setup, learner, held_out, own_loss)):
        # 1. This rank's pairs of the step, chosen and rejected in turn; they share their prompt's computation.
        pairs_of_step = loader.take()

        # 2. One more token after each completion's end: the score at it has seen the whole completion.
        rows = [with_end(row) for pair in pairs_of_step for row in pair]
        batches = setup.collate(rows, rows_per_forward=2 * pairs_per_forward, rows_per_unit=2)

        # 3. Gradient of the mean over the step's pairs, then update.
        metrics = setup.update(learner, batches, loss_fn, denominator=len(pairs_of_step))
        setup.run.log(step, setup.train_metrics(metrics, batches))
