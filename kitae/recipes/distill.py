"""Distillation: a student learns the distributions of a teacher, on its own completions or on those of the data.

    prompts --student samples--> completions --+
                                               +--> rows -> batches --teacher's distributions--> divergence -> new weights
    data's own completions --------------------+

Papers: arXiv:2306.13649 (GKD; a step is one iteration of its algorithm 1), arXiv:1503.02531 (soft targets).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kitae.config import (
    BatchTrainSettings,
    CompletionSettings,
    DataSettings,
    EvalSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    SaveSettings,
    Section,
)

if TYPE_CHECKING:
    from kitae.recipes._setup import Setup


class TeacherSettings(Section):
    """The model to learn from; it needs the student's tokenizer, and lies in memory beside the student."""

    name_or_path: str | None = None
    """A model folder, a hub id, a run directory, or an adapter folder; none only where distill.store has every row."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute precision of the teacher; auto as in model.dtype."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 keeps the teacher in 4 bits: a quarter of the memory, and distributions that are a little off."""
    trust_remote_code: bool = False
    """Run Python code that comes with the teacher. Only for folders whose code you have read."""


class DistillSettings(Section):
    """The objective of distillation."""

    on_policy_share: float = Field(1.0, ge=0, le=1)
    """Share of steps on completions the student samples; the others take the data's own. 1 needs prompts only, and teaches
    the student where it really goes; 0 samples nothing and is much faster (lambda in GKD)."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    """forward_kl covers all that the teacher may say, reverse_kl keeps to what it finds likely, jsd lies between (beta)."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Of jsd: near 0 it acts like forward_kl, near 1 like reverse_kl."""
    temperature: float = Field(1.0, gt=0, le=20)
    """Both models' logits are divided by it: above 1 the teacher's less likely tokens count for more. The loss is not
    multiplied by its square."""
    ce_coef: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the data's own completions, added on steps that use them; more trusts the data more."""
    top_k: int = Field(0, ge=0)
    """Compare the teacher's k likeliest tokens, and all others together as one; 0 compares the whole vocabulary. A larger k
    is closer to that."""
    store: str | None = None
    """Folder for the teacher's top_k log-probs of every row: scored once, used by every later run, without the teacher in
    memory. Needs on_policy_share 0."""
    store_dtype: Literal["float32", "float16"] = "float32"
    """Numbers in the store; float16 takes a quarter less disk, and rounds probabilities by up to 0.4 %."""


class StudentRolloutSettings(CompletionSettings):
    """How the student samples completions on its own steps."""

    num_generations: int = Field(1, ge=1)
    """Completions per prompt; more make a step larger and slower, on the same number of prompts."""
    temperature: float = Field(1.0, gt=0, le=10)
    """Sampling temperature; higher shows the teacher more of what the student might say."""


class Settings(RunSettings):
    """Distillation from a teacher, on-policy (GKD), on data, or from its stored top-k log-probs: full, LoRA or QLoRA."""

    output_dir: str = "runs/distill"
    """The run's folder: final model at its top, checkpoints and logs beside it."""
    loss: str = ""
    """Your own loss instead, as file.py:function; see docs/recipes/custom-losses.md."""
    model: ModelSettings
    teacher: TeacherSettings = TeacherSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    distill: DistillSettings = DistillSettings()
    rollout: StudentRolloutSettings = StudentRolloutSettings()
    train: BatchTrainSettings = BatchTrainSettings()
    optim: OptimSettings = OptimSettings()
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings(metric="eval/divergence")
    log: LogSettings = LogSettings()


def train(cfg: Settings, setup: Setup) -> None:
    """Each step: sample or take completions, ask the teacher about them, move the student towards it."""
    from kitae.algos import averaging
    from kitae.recipes import _distill as parts

    data = parts.open_data(cfg, setup)
    teacher = parts.RunTeacher(cfg, setup, data=data)
    total = setup.total_steps(steps_per_epoch=data.steps_per_epoch)
    learner = setup.learner(total_steps=total)
    teacher.load()
    sampler = parts.make_sampler(cfg, setup, learner) if cfg.distill.on_policy_share else None
    loss_fns = parts.loss_functions(cfg)
    evaluate = parts.evaluator(cfg, setup, learner=learner, teacher=teacher, sampler=sampler, data=data)

    for step in setup.steps(total, evaluate=evaluate):
        metrics: dict[str, float] = {}
        # 1. Completions: the student's own, or the data's. The step's number decides, on every rank alike.
        is_sampled = parts.is_on_policy(cfg, step=step)
        if is_sampled:
            assert sampler is not None and data.prompts is not None
            with setup.timer("rollout"):
                rows, found = parts.sampled_rows(cfg, setup, sampler, data.prompts.take(), teacher, step=step)
            metrics |= found
        else:
            assert data.rows is not None
            rows = [row for item in data.rows.take() for row in item]

        # 2. One denominator for the whole step, whatever the forward passes and ranks.
        weighed, denominator = averaging.weigh(rows, cfg.train.average)
        batches = setup.collate(weighed, rows_per_forward=cfg.train.per_device_train_batch_size)

        # 3. Each forward pass asks the teacher about its own rows; then gradient and update.
        asked = teacher.attach(batches, is_sampled=is_sampled)
        with setup.timer("update"):
            metrics |= setup.update(learner, asked, loss_fns[is_sampled], denominator=denominator)
        metrics["rollout/on_policy"] = float(is_sampled)
        setup.run.log(step, setup.train_metrics(metrics, batches))
