"""What cannot be meant: settings that contradict each other, and settings that would have no effect."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kitae.plugins import did_you_mean, names_model
from kitae.settings.draft import Draft

_BY_SAMPLING = (
    "eval/accuracy",
    "eval/reward",
    "eval/format_rate",
    "eval/completion_length",
    "eval/truncated",
)
PREFERENCE = ("dpo", "simpo", "kto", "orpo")
"""Recipes that compare completions of one prompt by their log-probs."""
EVALUATED = {
    "reward_model": ("eval/loss", "eval/accuracy", "eval/margin", "eval/reward", "eval/calibration_error"),
    **dict.fromkeys(PREFERENCE, ("eval/loss", "eval/accuracy", "eval/margin")),
    "sft": ("eval/loss", "eval/perplexity"),
    "grpo": _BY_SAMPLING,
    "ppo": _BY_SAMPLING,
    "distill": (
        "eval/divergence",
        "eval/loss",
        "eval/perplexity",
        "eval/completion_length",
        "eval/truncated",
    ),
}
"""What evaluation during a run reports, by recipe."""
SAMPLING = ("grpo", "ppo")
"""Recipes that alternate rounds of sampling with updates."""


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
    if recipe in SAMPLING and cfg.rollout.updates_per_round > cfg.rollout.prompts_per_round:
        yield (
            f"rollout.updates_per_round is {cfg.rollout.updates_per_round}, but a round has only "
            f"{cfg.rollout.prompts_per_round} prompts (rollout.prompts_per_round) to be cut into updates"
        )
    if recipe in SAMPLING and cfg.reward.function in cfg.reward.extra:
        yield f"reward.extra names {cfg.reward.function}, which is reward.function; its weight is reward.weight"
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
    if _picks_best(cfg) and share == 1 and cfg.save.metric in ("eval/loss", "eval/perplexity"):
        yield (
            f"save.metric is {cfg.save.metric}, which needs completions in the data, and distill.on_policy_share is 1; take "
            "eval/divergence"
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
    if recipe == "ppo":
        for condition, names, reason in _idle_in_ppo(cfg):
            yield from idle(condition, names, reason)
    if recipe == "distill":
        for condition, names, reason in _idle_in_distill(cfg):
            yield from idle(condition, names, reason)
    if recipe == "grpo":
        for condition, names, reason in _idle_in_grpo(cfg):
            yield from idle(condition, names, reason)
    if recipe in PREFERENCE:
        yield from idle(True, "data.target", f"{recipe} takes completions as they are written")
        numbers = [name for name in type(getattr(cfg, recipe)).model_fields if name != "reference"]
        yield from idle(
            bool(cfg.loss), " ".join(f"{recipe}.{n}" for n in numbers), "the loss is your own (loss)"
        )
    if recipe == "dpo":
        yield from idle(
            cfg.dpo.loss_type == "ipo",
            "dpo.label_smoothing",
            "dpo.loss_type is ipo, which has no such number",
        )
    if recipe == "reward_model":
        yield from idle(bool(cfg.loss), "reward_model.center_coef", "the loss is your own (loss)")
    if hasattr(cfg, "rollout"):
        yield from idle(
            cfg.rollout.engine == "generic",
            "rollout.kv_cache_tokens",
            "rollout.engine is generic, which keeps rows, not tokens; see rollout.inference_batch_size",
        )
    if recipe in SAMPLING:
        yield from idle(
            True,
            "data.max_length",
            f"lengths in {recipe} are rollout.max_prompt_length and rollout.max_new_tokens",
        )
        yield from idle(
            True, "eval.batch_size", f"{recipe} evaluates by sampling, rollout.inference_batch_size at a time"
        )
        rewards = (cfg.reward.function, *cfg.reward.extra)
        yield from idle(
            "reasoning" not in rewards,
            "reward.form reward.strict_form",
            f"reward.function is {cfg.reward.function}, and only the reasoning reward has a form",
        )
        yield from idle(
            all(map(names_model, rewards)),
            "reward.on_error",
            "only functions raise, and the reward is a model",
        )


def _idle_in_ppo(cfg: Any) -> Iterator[tuple[bool, str, str]]:
    """Of settings only PPO has: whether they are idle, which, and why."""
    is_shared = cfg.ppo.critic == "shared"
    yield (
        is_shared,
        "critic.name_or_path critic.learning_rate critic.warmup_rounds",
        "ppo.critic is shared, so the critic is part of the policy",
    )
    yield not is_shared, "ppo.value_coef", "ppo.critic is separate, and has an update of its own"
    yield not cfg.ppo.target_kl, "ppo.kl_horizon", "ppo.target_kl is 0, so the KL weight stays ppo.kl_coef"
    yield (
        cfg.rollout.mask_truncated,
        "ppo.missing_eos_penalty",
        "rollout.mask_truncated takes the completions it is for out of the loss",
    )
    yield bool(cfg.loss), "ppo.clip_low ppo.clip_high", "the policy's loss is your own (loss)"


def _idle_in_grpo(cfg: Any) -> Iterator[tuple[bool, str, str]]:
    """Of settings only GRPO has: whether they are idle, which, and why."""
    yield (
        bool(cfg.loss),
        "grpo.clip_low grpo.clip_high grpo.dual_clip grpo.ratio grpo.objective grpo.entropy_coef",
        "the loss is your own (loss)",
    )
    yield (
        cfg.grpo.objective == "cispo",
        "grpo.clip_low grpo.dual_clip",
        "grpo.objective is cispo, whose weights are only bounded above",
    )
    yield (
        cfg.grpo.advantage != "group",
        "grpo.scale_by_std",
        f"grpo.advantage is {cfg.grpo.advantage}, which has a scale of its own",
    )
    yield not cfg.grpo.kl_coef, "grpo.ref_refresh_rounds", "grpo.kl_coef is 0, so there is no reference"
    yield not cfg.rollout.overlong_buffer, "rollout.overlong_factor", "rollout.overlong_buffer is 0"


def _idle_in_distill(cfg: Any) -> Iterator[tuple[bool, str, str]]:
    """Likewise of distillation."""
    spec = cfg.distill
    yield (
        spec.divergence != "jsd",
        "distill.beta",
        f"distill.divergence is {spec.divergence}, which mixes nothing",
    )
    yield (
        spec.on_policy_share == 1,
        "distill.ce_coef data.max_length data.target",
        "distill.on_policy_share is 1, so the data's own completions are not used",
    )
    yield (
        spec.on_policy_share == 0,
        " ".join(f"rollout.{name}" for name in type(cfg.rollout).model_fields),
        "distill.on_policy_share is 0, so nothing is sampled",
    )
    yield spec.store is None, "distill.store_dtype", "distill.store is not set"
    yield bool(cfg.loss), "distill.ce_coef", "the loss is your own (loss)"
    yield (
        cfg.teacher.name_or_path is None,
        "teacher.revision teacher.dtype teacher.quantization teacher.trust_remote_code",
        "teacher.name_or_path is not set, so all is in distill.store",
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
