"""Flags of other programs that mean something only together: precision, evaluation, saving, reporting, rewards.

Each rule looks at draft.together, and puts our settings. Meanings are those of docs/flags.md. What only programs of
reinforcement learning have is in rl_rules.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kitae.errors import ConfigError
from kitae.settings import rl_rules
from kitae.settings.conversions import REWARDS, from_json, paths_of
from kitae.settings.draft import Draft, Given, as_bool, as_int, origin_of


def apply(draft: Draft) -> None:
    """Run every rule; each does nothing where its flags are absent."""
    for rule in (
        _resume, _data_files, _precision, _plugin, _activation_offloading, _use_peft, _finetuning_type, _reporting, _saving,
        _evaluation, _do_sample, _rewards,
    ):  # fmt: skip
        rule(draft)
    rl_rules.apply(draft)
    if draft.command == "distill":
        _mixture(draft)


def _resume(draft: Draft) -> None:
    for given in draft.taken("resume_from_checkpoint"):
        if str(given.value).lower() in ("true", "false", "none"):
            draft.put("resume", str(given.value).lower() == "true", given.origin)
            continue
        output, checkpoint = Path(str(draft.value("output_dir"))), Path(str(given.value))
        if output.resolve() not in (checkpoint.resolve(), *checkpoint.resolve().parents):
            raise ConfigError(
                f"{given.origin.where} is {checkpoint}, which is not inside output_dir {output}; kitae resumes in "
                f"place: give --output_dir and --resume, or start from it with --model_name_or_path {checkpoint}"
            )
        draft.put("resume", True, given.origin)
        if checkpoint.resolve() != output.resolve():
            draft.warn(f"{given.origin.where}: the newest complete checkpoint in {output} is taken")


def _rewards(draft: Draft) -> None:
    """Rewards by name, the first the main one, with their weights."""
    weights = [weight for given in draft.taken("reward_weights") for weight in _numbers(given)]
    for given in draft.taken("reward_funcs"):
        names = [REWARDS.get(str(name), str(name)) for name in _as_list(given.value)]
        if weights and len(weights) != len(names):
            raise ConfigError(
                f"{draft.together['reward_weights'].origin.where} has {len(weights)} weights and {given.origin.where} "
                f"{len(names)} names; give one weight per reward"
            )
        # Names of other programs may mean the same reward here.
        weighed = dict(zip(names, weights or [1.0] * len(names), strict=True))
        draft.put("reward.function", names[0], given.origin)
        if weights:
            draft.put("reward.weight", weighed[names[0]], given.origin)
        if others := {name: weight for name, weight in weighed.items() if name != names[0]}:
            draft.put("reward.extra", others, given.origin)
        return
    if weights:
        origin = draft.together["reward_weights"].origin
        raise ConfigError(
            f"{origin.where} weighs nothing: name the rewards with --reward_funcs, or set reward.weight and reward.extra"
        )


def _numbers(given: Given) -> list[float]:
    try:
        return [float(value) for value in _as_list(given.value)]
    except (TypeError, ValueError):
        raise ConfigError(f"{given.origin.where} is {given.value!r}; it takes numbers") from None


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _data_files(draft: Draft) -> None:
    for given in draft.taken("data_files"):
        value = from_json(given)
        if not isinstance(value, Mapping):
            draft.put("data.train", paths_of(value), given.origin)
            continue
        known = {"train": "data.train", "test": "data.eval", "validation": "data.eval", "eval": "data.eval"}
        for split, paths in value.items():
            if split not in known:
                raise ConfigError(f"{given.origin.where} has {split!r}; it takes {', '.join(known)}")
            draft.put(known[split], paths_of(paths), given.origin)


def _precision(draft: Draft) -> None:
    wishes: list[tuple[str, str]] = []
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        for given in draft.taken(name):
            if as_bool(given.value, given.origin.where):
                wishes.append((given.origin.where, dtype))
    for given in draft.taken("mixed_precision"):
        words = {"bf16": "bfloat16", "fp16": "float16"}
        if given.value in words:
            wishes.append((given.origin.where, words[given.value]))
        elif given.value != "no":
            raise ConfigError(f"{given.origin.where} is {given.value!r}; choose one of bf16, fp16, no")
    if len({dtype for _, dtype in wishes}) > 1:
        raise ConfigError(
            f"{' and '.join(flag for flag, _ in wishes)} contradict each other; keep one of them"
        )
    if wishes and draft.has("model.dtype") and draft.value("model.dtype") not in ("auto", wishes[0][1]):
        where = draft.values["model.dtype"].origin.where
        raise ConfigError(f"{wishes[0][0]} and {where} {draft.value('model.dtype')} contradict each other")
    draft.dtype_wish = wishes[0] if wishes else None


def _plugin(draft: Draft) -> None:
    for given in draft.taken("plugin"):
        known = ("gemini", "gemini_auto", "zero2", "zero2_cpu", "3d", "ddp", "moe")
        if given.value not in known:
            raise ConfigError(f"{given.origin.where} is {given.value!r}; choose one of {', '.join(known)}")
        what = "CPU offload is not there yet, and ranks" if given.value == "zero2_cpu" else "ranks"
        draft.warn(f"{given.origin.where} {given.value} has no effect: {what} shard by FSDP2 by themselves")


def _activation_offloading(draft: Draft) -> None:
    for given in draft.taken("activation_offloading"):
        if as_bool(given.value, given.origin.where):
            name = "model.gradient_checkpointing"
            if draft.has(name) and draft.value(name) is True:  # what is recomputed from is what is offloaded
                del draft.values[name]
            draft.put(name, "offload", given.origin)


def _use_peft(draft: Draft) -> None:
    for given in draft.taken("use_peft"):
        wanted = as_bool(given.value, given.origin.where)
        if wanted and not draft.has("lora.rank"):
            draft.put("lora.rank", 16, given.origin)
            if not draft.has("lora.alpha"):
                draft.put("lora.alpha", 32, given.origin)
        elif not wanted and draft.has("lora.rank") and str(draft.value("lora.rank")) != "0":
            where = draft.values["lora.rank"].origin.where
            raise ConfigError(
                f"{given.origin.where} false and {where} {draft.value('lora.rank')} contradict each other"
            )


def _finetuning_type(draft: Draft) -> None:
    """LLaMA-Factory's word for LoRA, with its defaults."""
    for given in draft.taken("finetuning_type"):
        if given.value not in ("lora", "full"):
            raise ConfigError(f"{given.origin.where} is {given.value!r}; choose lora or full")
        if given.value == "lora":
            draft.put_default("lora.rank", 8, given.origin)
            draft.put_default("lora.alpha", 2 * as_int(draft.value("lora.rank"), "lora.rank"), given.origin)
        elif draft.has("lora.rank") and str(draft.value("lora.rank")) != "0":
            where = draft.values["lora.rank"].origin.where
            raise ConfigError(
                f"{given.origin.where} full and {where} {draft.value('lora.rank')} contradict each other"
            )


def _reporting(draft: Draft) -> None:
    wanted: list[str] = []
    flags = draft.taken("report_to", "use_wandb")
    for given in draft.taken("report_to"):
        words = given.value if isinstance(given.value, list) else str(given.value).split(",")
        wanted += ["tensorboard", "wandb"] if words == ["all"] else [str(word).strip() for word in words]
    for given in draft.taken("use_wandb"):
        if as_bool(given.value, given.origin.where):
            wanted += [] if "report_to" in draft.together else ["tensorboard"]
            wanted.append("wandb")
    if wanted:
        draft.put("log.report_to", list(dict.fromkeys(wanted)), origin_of(*flags))


def _saving(draft: Draft) -> None:
    strategy = _strategy(draft, "save_strategy", ours="save.steps", words=("steps", "no", "best"))
    for given in draft.taken("save_steps"):
        if strategy == "no":
            draft.warn(f"{given.origin.where} has no effect: the save strategy is no")
        else:
            draft.put("save.steps", given.value, given.origin)
    if strategy == "best":
        draft.put("save.final", "best", draft.together["save_strategy"].origin)


def _evaluation(draft: Draft) -> None:
    for given in draft.taken("logging_steps"):
        draft.put("log.steps", given.value, given.origin)
    strategy = _strategy(draft, "evaluation_strategy", ours="eval.steps", words=("steps", "no"))
    for given in draft.taken("do_eval"):
        if strategy is None and as_bool(given.value, given.origin.where):
            strategy = "steps"
    for given in draft.taken("eval_interval"):
        draft.put("eval.steps", 0 if str(given.value) == "-1" else given.value, given.origin)
    for given in draft.taken("eval_steps"):
        if strategy == "no":
            draft.warn(f"{given.origin.where} has no effect: the evaluation strategy is no")
        else:
            draft.put("eval.steps", given.value, given.origin)
    if strategy == "steps" and not draft.has("eval.steps"):
        asked = draft.taken("evaluation_strategy", "do_eval")
        if not draft.has("log.steps"):
            raise ConfigError(f"{asked[0].origin.where} steps: how many? add --eval_steps")
        draft.put("eval.steps", draft.value("log.steps"), origin_of(*asked))


def _strategy(draft: Draft, flag: str, *, ours: str, words: tuple[str, ...]) -> str | None:
    for given in draft.taken(flag):
        if given.value == "epoch":
            raise ConfigError(
                f"{given.origin.where} epoch is not there; count in optimizer steps: --{ours} 100"
            )
        if given.value not in words:
            raise ConfigError(f"{given.origin.where} is {given.value!r}; choose one of {', '.join(words)}")
        return str(given.value)
    return None


def _do_sample(draft: Draft) -> None:
    for given in draft.taken("do_sample"):
        if not as_bool(given.value, given.origin.where):
            if draft.has("temperature") and float(draft.value("temperature")) != 0:
                draft.warn(
                    f"{draft.values.pop('temperature').origin.where} has no effect: do_sample is false"
                )
            draft.put("temperature", 0.0, given.origin)
        elif not draft.has("temperature"):
            draft.put("temperature", 1.0, given.origin)


def _mixture(draft: Draft) -> None:
    """TRL's beta of GKD: both ends are the KL divergences, not the mixture's limits."""
    for given in draft.taken("beta"):
        try:
            beta = float(given.value)
        except (TypeError, ValueError):
            raise ConfigError(f"{given.origin.where} is {given.value!r}, which is not a number") from None
        draft.put("distill.divergence", {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd"), given.origin)
        if beta not in (0.0, 1.0):
            draft.put("distill.beta", beta, given.origin)
