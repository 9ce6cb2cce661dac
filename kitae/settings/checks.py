"""What cannot be meant: settings that contradict each other, and settings that would have no effect."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kitae.plugins import did_you_mean
from kitae.settings.draft import Draft

EVALUATED = {
    "sft": ("eval/loss", "eval/perplexity"),
    "grpo": (
        "eval/accuracy",
        "eval/reward",
        "eval/format_rate",
        "eval/completion_length",
        "eval/truncated",
    ),
}
"""What evaluation during a run reports, by recipe."""


def contradictions(recipe: str, cfg: Any) -> Iterator[str]:
    """Why these settings cannot all hold. `cfg` is the recipe's Settings (Any: each recipe has its own class)."""
    if not cfg.data.train:
        yield "data.train is empty; name training rows with --dataset_name (a file, glob, folder or hub name)"
    if cfg.resume and cfg.overwrite:
        yield "resume and overwrite are both on; one keeps the run in output_dir, the other removes it"
    if cfg.model.quantization != "none" and not cfg.lora.rank:
        yield (
            f"model.quantization is {cfg.model.quantization} and lora.rank is 0: 4-bit weights are frozen and only "
            "adapters can train; set lora.rank, such as 16"
        )
    if cfg.data.weights and len(cfg.data.weights) != len(cfg.data.train):
        yield (
            f"data.weights has {len(cfg.data.weights)} entries and data.train {len(cfg.data.train)}; "
            "give one weight per source"
        )
    if "none" in cfg.log.report_to and len(cfg.log.report_to) > 1:
        yield f"log.report_to is {' '.join(cfg.log.report_to)}; none stands alone"
    if cfg.eval.steps and not _evaluates(cfg):
        yield f"eval.steps is {cfg.eval.steps}, but there are no evaluation rows: data.eval is empty and data.hold_out 0"
    if not _evaluates(cfg):
        for name, is_on in (
            ("save.final = best", cfg.save.final == "best"),
            ("train.early_stopping_patience", cfg.train.early_stopping_patience > 0),
        ):
            if is_on:
                yield f"{name} needs evaluation during the run; set eval.steps (and data.eval, or leave data.hold_out)"
    metric, reported = cfg.save.metric, EVALUATED.get(recipe)
    if _picks_best(cfg) and reported and metric not in reported:
        yield f"save.metric is {metric}, which {recipe} does not evaluate; {did_you_mean(metric, reported)}"
    if (both := set(cfg.data.eval) & set(cfg.data.train)) and not cfg.data.eval_split:
        yield f"data.eval and data.train both name {min(both)}; give other rows, or data.eval_split for a hub data set"
    if cfg.data.eval_split and not cfg.data.eval and any(map(_is_here, cfg.data.train)):
        yield (
            f"data.eval_split is {cfg.data.eval_split}, but data.train is files here, which have no splits: evaluation "
            "would see the training rows; name other files with data.eval, or leave it out for a hold-out"
        )
    if recipe == "grpo" and cfg.rollout.updates_per_round > cfg.rollout.prompts_per_round:
        yield (
            f"rollout.updates_per_round is {cfg.rollout.updates_per_round}, but a round has only "
            f"{cfg.rollout.prompts_per_round} prompts (rollout.prompts_per_round) to be cut into updates"
        )


def without_effect(draft: Draft, cfg: Any) -> Iterator[tuple[str, str]]:
    """(setting, reason) for each setting that was given, differs from its default, and changes nothing."""
    for name, reason in _idle(draft.command, cfg):
        if name not in draft.values:
            continue
        value = cfg
        for part in name.split("."):
            value = getattr(value, part)
        if value != draft.known[name].default:
            yield name, reason


def _idle(recipe: str, cfg: Any) -> Iterator[tuple[str, str]]:
    def idle(condition: bool, names: str, reason: str) -> Iterator[tuple[str, str]]:
        if condition:
            yield from ((name, reason) for name in names.split())

    given_rows = bool(cfg.data.eval or cfg.data.eval_split)
    yield from idle(
        not cfg.lora.rank,
        "lora.alpha lora.dropout lora.target_modules lora.bias lora.use_rslora lora.init_seed",
        "lora.rank is 0, so there are no adapters",
    )
    yield from idle(
        cfg.optim.name == "adafactor",
        "optim.beta1 optim.beta2 optim.epsilon",
        "optim.name is adafactor, which has no such number",
    )
    yield from idle(cfg.optim.on_nonfinite == "stop", "optim.max_skipped", "optim.on_nonfinite is stop")
    yield from idle(
        cfg.optim.lr_scheduler == "constant", "optim.min_lr_ratio", "optim.lr_scheduler is constant"
    )
    yield from idle(
        all(map(_is_here, cfg.data.train)), "data.split", "data.train is files here, which have no splits"
    )
    yield from idle(
        bool(cfg.data.eval) and all(map(_is_here, cfg.data.eval)),
        "data.eval_split",
        "data.eval is files here, which have no splits",
    )
    yield from idle(given_rows, "data.hold_out", "evaluation rows are given by data.eval or data.eval_split")
    yield from idle(
        not given_rows and not cfg.eval.steps, "data.hold_out", "eval.steps is 0, so nothing is evaluated"
    )
    yield from idle(
        not _evaluates(cfg),
        "eval.at_start eval.batch_size eval.max_rows",
        "nothing is evaluated; set eval.steps or data.eval",
    )
    yield from idle(
        not _picks_best(cfg),
        "save.metric save.metric_mode",
        "neither save.final is best nor train.early_stopping_patience above 0",
    )
    yield from idle("wandb" not in cfg.log.report_to, "log.wandb_project", "log.report_to has no wandb")
    yield from idle(
        "tensorboard" not in cfg.log.report_to, "log.tensorboard_dir", "log.report_to has no tensorboard"
    )
    yield from idle(not cfg.resume, "allow_inexact", "resume is off")
    if recipe == "grpo":
        yield from idle(
            True,
            "data.max_length",
            "lengths in grpo are rollout.max_prompt_length and rollout.max_new_tokens",
        )
        yield from idle(
            True, "eval.batch_size", "grpo evaluates by sampling, rollout.inference_batch_size at a time"
        )
        yield from idle(
            cfg.reward.function != "reasoning",
            "reward.form reward.strict_form",
            f"reward.function is {cfg.reward.function}, and only the reasoning reward has a form",
        )


def _picks_best(cfg: Any) -> bool:
    return bool(cfg.save.final == "best" or cfg.train.early_stopping_patience > 0)


def _is_here(path: str) -> bool:
    """Whether a data path is a file, folder or glob of this machine, and no name of the hub."""
    try:
        return glob.has_magic(path) or Path(path).expanduser().exists()
    except OSError:  # a name that no file can have
        return False


def _evaluates(cfg: Any) -> bool:
    return bool(cfg.data.eval or cfg.data.eval_split or (cfg.eval.steps and cfg.data.hold_out))
