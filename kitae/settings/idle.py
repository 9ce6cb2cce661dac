"""Settings that would have no effect, and why: one of ours is refused, another program's flag is warned of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kitae.plugins import names_model
from kitae.settings.aliases import PREFERENCE, ROUNDS
from kitae.settings.checks import evaluates, is_here, picks_best
from kitae.settings.draft import Draft

Case = tuple[bool, str, str]
"""Whether settings are idle, which (full names with blanks between), and why."""


def without_effect(draft: Draft, cfg: Any) -> Iterator[tuple[str, str]]:
    """(setting, reason) for each setting that was given, differs from its default, and changes nothing.

    `cfg` is the recipe's Settings (Any: each recipe has its own class).
    """
    for is_idle, names, reason in _cases(draft.command, cfg):
        for name in names.split() if is_idle else ():
            if name not in draft.values:
                continue
            value = cfg
            for part in name.split("."):
                value = getattr(value, part)
            if value != draft.known[name].default:
                yield name, reason


def _cases(recipe: str, cfg: Any) -> Iterator[Case]:
    yield from _of_any(cfg)
    if recipe == "ppo":
        yield from _of_ppo(cfg)
    if recipe == "distill":
        yield from _of_distill(cfg)
    if recipe == "grpo":
        yield from _of_grpo(cfg)
    if recipe in PREFERENCE:
        yield from _of_preference(recipe, cfg)
    if recipe == "reward_model":
        yield bool(cfg.loss), "reward_model.center_coef", "the loss is your own (loss)"
    if hasattr(cfg, "rollout"):
        yield (
            cfg.rollout.engine == "generic",
            "rollout.kv_cache_tokens",
            "rollout.engine is generic, which keeps rows, not tokens; see rollout.inference_batch_size",
        )
    if recipe in ROUNDS:
        yield from _of_rounds(recipe, cfg)


def _of_any(cfg: Any) -> Iterator[Case]:
    given_rows = bool(cfg.data.eval or cfg.data.eval_split)
    yield (
        not cfg.lora.rank,
        "lora.alpha lora.dropout lora.target_modules lora.bias lora.use_rslora lora.init_seed",
        "lora.rank is 0, so there are no adapters",
    )
    yield (
        cfg.optim.name == "adafactor",
        "optim.beta1 optim.beta2 optim.epsilon",
        "optim.name is adafactor, which has no such number",
    )
    yield cfg.optim.on_nonfinite == "stop", "optim.max_skipped", "optim.on_nonfinite is stop"
    yield cfg.optim.lr_scheduler == "constant", "optim.min_lr_ratio", "optim.lr_scheduler is constant"
    yield all(map(is_here, cfg.data.train)), "data.split", "data.train is files here, which have no splits"
    yield (
        bool(cfg.data.eval) and all(map(is_here, cfg.data.eval)),
        "data.eval_split",
        "data.eval is files here, which have no splits",
    )
    yield given_rows, "data.hold_out", "evaluation rows are given by data.eval or data.eval_split"
    yield (
        not given_rows and not cfg.eval.steps,
        "data.hold_out",
        "eval.steps is 0, so nothing is evaluated",
    )
    yield (
        not evaluates(cfg),
        "eval.at_start eval.batch_size eval.max_rows",
        "nothing is evaluated; set eval.steps or data.eval",
    )
    yield (
        not picks_best(cfg),
        "save.metric save.metric_mode",
        "neither save.final is best nor train.early_stopping_patience above 0",
    )
    yield "wandb" not in cfg.log.report_to, "log.wandb_project", "log.report_to has no wandb"
    yield "tensorboard" not in cfg.log.report_to, "log.tensorboard_dir", "log.report_to has no tensorboard"
    yield not cfg.resume, "allow_inexact", "resume is off"


def _of_preference(recipe: str, cfg: Any) -> Iterator[Case]:
    yield True, "data.target", f"{recipe} takes completions as they are written"
    numbers = [name for name in type(getattr(cfg, recipe)).model_fields if name != "reference"]
    yield bool(cfg.loss), " ".join(f"{recipe}.{n}" for n in numbers), "the loss is your own (loss)"
    if recipe == "dpo":
        yield (
            cfg.dpo.loss_type == "ipo",
            "dpo.label_smoothing",
            "dpo.loss_type is ipo, which has no such number",
        )


def _of_rounds(recipe: str, cfg: Any) -> Iterator[Case]:
    yield (
        True,
        "data.max_length",
        f"lengths in {recipe} are rollout.max_prompt_length and rollout.max_new_tokens",
    )
    yield True, "eval.batch_size", f"{recipe} evaluates by sampling, rollout.inference_batch_size at a time"
    rewards = (cfg.reward.function, *cfg.reward.extra)
    yield (
        "reasoning" not in rewards,
        "reward.form reward.strict_form",
        f"reward.function is {cfg.reward.function}, and only the reasoning reward has a form",
    )
    yield all(map(names_model, rewards)), "reward.on_error", "only functions raise, and the reward is a model"


def _of_ppo(cfg: Any) -> Iterator[Case]:
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


def _of_grpo(cfg: Any) -> Iterator[Case]:
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


def _of_distill(cfg: Any) -> Iterator[Case]:
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
