"""Settings that contradict each other. Those that would have no effect are in idle.py."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kitae.plugins import did_you_mean, names_model
from kitae.settings.aliases import PREFERENCE, ROUNDS

EVALUATED = {
    "reward_model": ("eval/loss", "eval/accuracy", "eval/margin", "eval/reward", "eval/calibration_error"),
    **dict.fromkeys(PREFERENCE, ("eval/loss", "eval/accuracy", "eval/margin")),
    "sft": ("eval/loss", "eval/perplexity"),
    **dict.fromkeys(
        ROUNDS,
        ("eval/accuracy", "eval/reward", "eval/format_rate", "eval/completion_length", "eval/truncated"),
    ),
    "distill": (
        "eval/divergence",
        "eval/loss",
        "eval/perplexity",
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
    if cfg.eval.steps and not evaluates(cfg):
        yield f"eval.steps is {cfg.eval.steps}, but there are no evaluation rows: data.eval is empty and data.hold_out 0"
    if not evaluates(cfg):
        for name, is_on in (
            ("save.final = best", cfg.save.final == "best"),
            ("train.early_stopping_patience", cfg.train.early_stopping_patience > 0),
        ):
            if is_on:
                yield f"{name} needs evaluation during the run; set eval.steps (and data.eval, or leave data.hold_out)"
    metric, reported = cfg.save.metric, EVALUATED.get(recipe)
    if picks_best(cfg) and reported and metric not in reported:
        yield f"save.metric is {metric}, which {recipe} does not evaluate; {did_you_mean(metric, reported)}"
    if (both := set(cfg.data.eval) & set(cfg.data.train)) and not cfg.data.eval_split:
        yield f"data.eval and data.train both name {min(both)}; give other rows, or data.eval_split for a hub data set"
    if cfg.data.eval_split and not cfg.data.eval and any(map(is_here, cfg.data.train)):
        yield (
            f"data.eval_split is {cfg.data.eval_split}, but data.train is files here, which have no splits: evaluation "
            "would see the training rows; name other files with data.eval, or leave it out for a hold-out"
        )
    if recipe in ROUNDS:
        yield from _contradictions_in_rounds(cfg)
    engine = cfg.rollout.engine if hasattr(cfg, "rollout") else None
    if engine in ("generic", "paged") and cfg.rollout.quantization == "int8":
        yield (
            f"rollout.quantization is int8 and rollout.engine {engine}, but only the native engine has 8-bit weights; "
            "set one of them otherwise"
        )
    if recipe == "ppo":
        yield from _contradictions_in_ppo(cfg)
    if recipe == "distill":
        yield from _contradictions_in_distill(cfg)
    if recipe == "grpo":
        yield from _contradictions_in_grpo(cfg)
    if recipe in ("dpo", "kto") and getattr(cfg, recipe).reference == "each_step":
        yield from _contradictions_in_reference(recipe, cfg)


def _contradictions_in_reference(recipe: str, cfg: Any) -> Iterator[str]:
    if not cfg.lora.rank:
        yield (
            f"{recipe}.reference is each_step and lora.rank is 0: without adapters to switch off, the starting model is "
            "gone after step 1; set it to cache"
        )
    elif cfg.lora.bias != "none":
        yield (
            f"{recipe}.reference is each_step and lora.bias is {cfg.lora.bias}: biases of the model itself train, and "
            "cannot be switched off; set the first to cache, or lora.bias to none"
        )


def _contradictions_in_rounds(cfg: Any) -> Iterator[str]:
    if cfg.rollout.updates_per_round > cfg.rollout.prompts_per_round:
        yield (
            f"rollout.updates_per_round is {cfg.rollout.updates_per_round}, but a round has only "
            f"{cfg.rollout.prompts_per_round} prompts (rollout.prompts_per_round) to be cut into updates"
        )
    if cfg.reward.function in cfg.reward.extra:
        yield f"reward.extra names {cfg.reward.function}, which is reward.function; its weight is reward.weight"


def _contradictions_in_ppo(cfg: Any) -> Iterator[str]:
    if cfg.rollout.quantization == "int8":
        yield (
            "rollout.quantization is int8, and ppo takes the sampler's log-probs for the policy's own; set it to none, or "
            "use grpo, which corrects for the difference by grpo.is_cap"
        )
    if cfg.ppo.target_kl and not cfg.ppo.kl_coef:
        yield (
            f"ppo.target_kl is {cfg.ppo.target_kl} and ppo.kl_coef 0: the steered weight starts at ppo.kl_coef and grows "
            "by a factor, so it would stay 0; set ppo.kl_coef, such as 0.05"
        )


def _contradictions_in_grpo(cfg: Any) -> Iterator[str]:
    yield from _contradictions_ahead(cfg)
    grpo, rollout = cfg.grpo, cfg.rollout
    if grpo.dual_clip and grpo.dual_clip <= 1 + grpo.clip_high:
        yield (
            f"grpo.dual_clip is {grpo.dual_clip:g}, which is not above 1 + grpo.clip_high = {1 + grpo.clip_high:g}; it "
            "bounds ratios that clip_high leaves alone, 3 is usual"
        )
    if rollout.quantization == "int8" and not grpo.is_cap:
        yield (
            "rollout.quantization is int8 and grpo.is_cap is 0: the sampler's log-probs are not quite the learner's and "
            "need a correction; set grpo.is_cap too, such as 2"
        )
    judge = cfg.reward.function
    if rollout.curriculum == "pass_rate" and (names_model(judge) or judge == "repetition"):
        yield (
            f"rollout.curriculum is pass_rate and reward.function {judge}, whose rewards do not say what is right; set the "
            "first to none, or take a reward that earns 1 for a right answer"
        )
    if rollout.overlong_buffer > rollout.max_new_tokens:
        yield (
            f"rollout.overlong_buffer is {rollout.overlong_buffer}, more than rollout.max_new_tokens "
            f"{rollout.max_new_tokens}; a quarter of it is usual"
        )


def _contradictions_ahead(cfg: Any) -> Iterator[str]:
    if cfg.rollout.rounds_ahead and not cfg.grpo.is_cap:
        yield (
            "rollout.rounds_ahead is 1 and grpo.is_cap is 0: completions of older weights need a correction; set "
            "grpo.is_cap too, such as 2"
        )
    if cfg.rollout.rounds_ahead and cfg.rollout.refill:
        yield (
            f"rollout.rounds_ahead is 1 and rollout.refill is {cfg.rollout.refill}: what to replace is known only when the "
            "round is judged, and the next one is sampled already; set one of them to 0"
        )


def _contradictions_in_distill(cfg: Any) -> Iterator[str]:
    share, store = cfg.distill.on_policy_share, cfg.distill.store
    if cfg.teacher.name_or_path is None and store is None:
        yield "there is no teacher; name one with teacher.name_or_path, or a filled distill.store"
    if store is not None and share > 0:
        yield (
            "distill.store holds what the teacher says of the data's own completions, and distill.on_policy_share "
            f"{share:g} samples others; set it to 0"
        )
    if store is not None and not cfg.distill.top_k:
        yield "distill.store keeps the teacher's k likeliest tokens, and distill.top_k is 0; set it, such as 64"
    if picks_best(cfg) and share == 1 and cfg.save.metric in ("eval/loss", "eval/perplexity"):
        yield (
            f"save.metric is {cfg.save.metric}, which needs completions in the data, and distill.on_policy_share is 1; take "
            "eval/divergence"
        )


def picks_best(cfg: Any) -> bool:
    return bool(cfg.save.final == "best" or cfg.train.early_stopping_patience > 0)


def is_here(path: str) -> bool:
    """Whether a data path is a file, folder or glob of this machine, and no name of the hub."""
    try:
        return glob.has_magic(path) or Path(path).expanduser().exists()
    except OSError:  # a name that no file can have
        return False


def evaluates(cfg: Any) -> bool:
    return bool(cfg.data.eval or cfg.data.eval_split or (cfg.eval.steps and cfg.data.hold_out))
