"""Flags of other programs that mean something only together: batch arithmetic, evaluation, precision, reporting.

Each rule looks at draft.together, and puts our settings. Meanings are those of docs/flags.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kitae.errors import ConfigError
from kitae.settings.aliases import REWARDS, paths_of, texts_of, unquoted
from kitae.settings.draft import Draft, Given, Origin, as_bool, as_int

_RL_EXAMPLE = ("inference_microbatch_size", "train_minibatch_size", "train_microbatch_size", "algo")
_LOSS_TYPES = {
    "grpo": ("sequence", "clip"),
    "dapo": ("token", "clip"),
    "bnpo": ("token", "clip"),
    "dr_grpo": ("constant", "clip"),
    "cispo": ("token", "cispo"),
}
"""TRL's loss types: our grpo.average and grpo.objective."""
_ALGOS: dict[str, dict[str, Any]] = {
    "GRPO": {"grpo.average": "sequence"},
    "RLOO": {"grpo.average": "sequence", "grpo.advantage": "rloo"},
    "REINFORCE_PPB": {"grpo.average": "sequence", "grpo.advantage": "reinforce++"},
    "DAPO": {
        "grpo.average": "token",
        "grpo.clip_high": 0.28,
        "rollout.mask_truncated": True,
        "rollout.refill": 3,
    },
}
"""What rl_example.py's -a stands for; each gives way to a setting that is given."""
_GENERATION = {
    "temperature": "rollout.initial_temperature",
    "top_p": "rollout.top_p",
    "top_k": "rollout.top_k",
    "min_p": "rollout.min_p",
    "stop": "rollout.stop",
    "stop_strings": "rollout.stop",
}
"""What TRL's generation_kwargs may hold that rollouts have too."""
_TRAIN_GRPO = ("num_collect_steps", "num_update_steps", "experience_batch_size")


def apply(draft: Draft) -> None:
    """Run every rule; each does nothing where its flags are absent."""
    for rule in (
        _resume, _data_files, _precision, _plugin, _activation_offloading, _use_peft, _reporting, _saving,
        _evaluation, _do_sample, _rewards,
    ):  # fmt: skip
        rule(draft)
    if draft.command == "grpo":
        for rule in (
            _sampled_at_once, _loss_type, _epsilon, _algo, _hugging_face_batch, _colossal_batch, _ray_batch,
            _reference_refresh, _generation_kwargs,
        ):  # fmt: skip
            rule(draft)
    if draft.command == "distill":
        _mixture(draft)
    if draft.command == "ppo":
        for rule in (_sampled_at_once, _cliprange, _hugging_face_batch, _colossal_batch, _ray_batch):
            rule(draft)


def _at(*given: Given) -> Origin:
    """The origin of a value derived from several flags."""
    where = " with ".join(dict.fromkeys(g.origin.where for g in given))
    return Origin(where=where, rank=max(g.origin.rank for g in given), is_foreign=True)


def _taken(draft: Draft, *names: str) -> list[Given]:
    return [draft.together[name] for name in names if name in draft.together]


def _resume(draft: Draft) -> None:
    for given in _taken(draft, "resume_from_checkpoint"):
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
    weights = [weight for given in _taken(draft, "reward_weights") for weight in _numbers(given)]
    for given in _taken(draft, "reward_funcs"):
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


def _from_json(given: Given) -> Any:
    """Its value, read where it is the text of a JSON object (Any: whatever that holds)."""
    try:
        return unquoted(given.value)
    except ValueError as error:
        raise ConfigError(f"{given.origin.where} is {given.value!r}, which is not JSON: {error}") from error


def _data_files(draft: Draft) -> None:
    for given in _taken(draft, "data_files"):
        value = _from_json(given)
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
        for given in _taken(draft, name):
            if as_bool(given.value, given.origin.where):
                wishes.append((given.origin.where, dtype))
    for given in _taken(draft, "mixed_precision"):
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
    for given in _taken(draft, "plugin"):
        known = ("gemini", "gemini_auto", "zero2", "zero2_cpu", "3d", "ddp", "moe")
        if given.value not in known:
            raise ConfigError(f"{given.origin.where} is {given.value!r}; choose one of {', '.join(known)}")
        what = "CPU offload is not there yet, and ranks" if given.value == "zero2_cpu" else "ranks"
        draft.warn(f"{given.origin.where} {given.value} has no effect: {what} shard by FSDP2 by themselves")


def _activation_offloading(draft: Draft) -> None:
    for given in _taken(draft, "activation_offloading"):
        if as_bool(given.value, given.origin.where):
            name = "model.gradient_checkpointing"
            if draft.has(name) and draft.value(name) is True:  # what is recomputed from is what is offloaded
                del draft.values[name]
            draft.put(name, "offload", given.origin)


def _use_peft(draft: Draft) -> None:
    for given in _taken(draft, "use_peft"):
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


def _reporting(draft: Draft) -> None:
    wanted: list[str] = []
    flags = _taken(draft, "report_to", "use_wandb")
    for given in _taken(draft, "report_to"):
        words = given.value if isinstance(given.value, list) else str(given.value).split(",")
        wanted += ["tensorboard", "wandb"] if words == ["all"] else [str(word).strip() for word in words]
    for given in _taken(draft, "use_wandb"):
        if as_bool(given.value, given.origin.where):
            wanted += [] if "report_to" in draft.together else ["tensorboard"]
            wanted.append("wandb")
    if wanted:
        draft.put("log.report_to", list(dict.fromkeys(wanted)), _at(*flags))


def _saving(draft: Draft) -> None:
    strategy = _strategy(draft, "save_strategy", ours="save.steps", words=("steps", "no", "best"))
    for given in _taken(draft, "save_steps"):
        if strategy == "no":
            draft.warn(f"{given.origin.where} has no effect: the save strategy is no")
        else:
            draft.put("save.steps", given.value, given.origin)
    if strategy == "best":
        draft.put("save.final", "best", draft.together["save_strategy"].origin)


def _evaluation(draft: Draft) -> None:
    for given in _taken(draft, "logging_steps"):
        draft.put("log.steps", given.value, given.origin)
    strategy = _strategy(draft, "evaluation_strategy", ours="eval.steps", words=("steps", "no"))
    for given in _taken(draft, "do_eval"):
        if strategy is None and as_bool(given.value, given.origin.where):
            strategy = "steps"
    for given in _taken(draft, "eval_interval"):
        draft.put("eval.steps", 0 if str(given.value) == "-1" else given.value, given.origin)
    for given in _taken(draft, "eval_steps"):
        if strategy == "no":
            draft.warn(f"{given.origin.where} has no effect: the evaluation strategy is no")
        else:
            draft.put("eval.steps", given.value, given.origin)
    if strategy == "steps" and not draft.has("eval.steps"):
        asked = _taken(draft, "evaluation_strategy", "do_eval")
        if not draft.has("log.steps"):
            raise ConfigError(f"{asked[0].origin.where} steps: how many? add --eval_steps")
        draft.put("eval.steps", draft.value("log.steps"), _at(*asked))


def _strategy(draft: Draft, flag: str, *, ours: str, words: tuple[str, ...]) -> str | None:
    for given in _taken(draft, flag):
        if given.value == "epoch":
            raise ConfigError(
                f"{given.origin.where} epoch is not there; count in optimizer steps: --{ours} 100"
            )
        if given.value not in words:
            raise ConfigError(f"{given.origin.where} is {given.value!r}; choose one of {', '.join(words)}")
        return str(given.value)
    return None


def _do_sample(draft: Draft) -> None:
    for given in _taken(draft, "do_sample"):
        if not as_bool(given.value, given.origin.where):
            if draft.has("temperature") and float(draft.value("temperature")) != 0:
                draft.warn(
                    f"{draft.values.pop('temperature').origin.where} has no effect: do_sample is false"
                )
            draft.put("temperature", 0.0, given.origin)
        elif not draft.has("temperature"):
            draft.put("temperature", 1.0, given.origin)


# GRPO --------------------------------------------------------------------------------------------------------------


def _generation_kwargs(draft: Draft) -> None:
    for given in _taken(draft, "generation_kwargs"):
        value = _from_json(given)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{given.origin.where} is {given.value!r}; it takes a JSON object")
        for name, own in value.items():
            if name not in _GENERATION:
                raise ConfigError(f"{given.origin.where} has {name!r}; it takes {', '.join(_GENERATION)}")
            to = _GENERATION[name]
            draft.put(to, texts_of(own) if to == "rollout.stop" else own, given.origin)


def _is_rl_example(draft: Draft) -> bool:
    """Whether the line is one of rl_example.py: it has a flag, or the short spelling of one, that only it has."""
    short = (g.origin.where for g in _taken(draft, "train_batch_size", "inference_batch_size"))
    return any(name in draft.together for name in _RL_EXAMPLE) or any(w in ("-tbs", "-ibs") for w in short)


def _sampled_at_once(draft: Draft) -> None:
    for given in _taken(draft, "inference_batch_size"):
        if _is_rl_example(draft):
            draft.warn(
                f"{given.origin.where} has no effect: -tbs sizes a round, and -imbs what is sampled at once"
            )
        else:
            draft.put("rollout.inference_batch_size", given.value, given.origin)


def _loss_type(draft: Draft) -> None:
    for given in _taken(draft, "loss_type"):
        word = str(given.value).lower()
        if word not in _LOSS_TYPES:
            raise ConfigError(
                f"{given.origin.where} is {given.value!r}; choose one of {', '.join(_LOSS_TYPES)}, or bring your own "
                "loss with --loss file.py:function"
            )
        average, objective = _LOSS_TYPES[word]
        draft.put("grpo.average", average, given.origin)
        if objective != "clip":
            draft.put("grpo.objective", objective, given.origin)
            _largest_weight(draft)


def _largest_weight(draft: Draft) -> None:
    """TRL's CISPO takes epsilon_high for the largest weight itself, and has no lower bound."""
    if (lower := draft.together.pop("epsilon", None)) is not None:
        draft.warn(f"{lower.origin.where} has no effect: cispo bounds weights above only, by --epsilon_high")
    if (given := draft.together.pop("epsilon_high", None)) is not None:
        try:
            above = float(given.value) - 1
        except ValueError as error:
            raise ConfigError(f"{given.origin.where} is {given.value!r}, which is no number") from error
        if above < 0:
            raise ConfigError(
                f"{given.origin.where} is {given.value}; with cispo it is the largest weight of a token, 1 or more"
            )
        draft.put("grpo.clip_high", above, given.origin)


def _reference_refresh(draft: Draft) -> None:
    steps = draft.number("ref_model_sync_steps", 512)
    for given in _taken(draft, "sync_ref_model"):
        if not as_bool(given.value, given.origin.where):
            continue
        per_round = 1
        for name in ("rollout.updates_per_round", "rollout.epochs_per_round"):
            per_round *= as_int(draft.value(name), name)
        rounds = max(1, round(steps / per_round))
        if rounds * per_round != steps:
            draft.warn(
                f"the reference is refreshed every {rounds * per_round} steps, not {steps}: in whole rounds of {per_round}"
            )
        draft.put("grpo.ref_refresh_rounds", rounds, _at(given, *_taken(draft, "ref_model_sync_steps")))
    if "sync_ref_model" not in draft.together:
        for given in _taken(draft, "ref_model_sync_steps"):
            draft.warn(f"{given.origin.where} has no effect: --sync_ref_model is missing")


def _epsilon(draft: Draft) -> None:
    for given in _taken(draft, "epsilon"):
        draft.put("grpo.clip_low", given.value, given.origin)
        if "epsilon_high" not in draft.together:
            draft.put("grpo.clip_high", given.value, given.origin)
    for given in _taken(draft, "epsilon_high"):
        draft.put("grpo.clip_high", given.value, given.origin)


def _cliprange(draft: Draft) -> None:
    for given in _taken(draft, "cliprange"):
        draft.put("ppo.clip_low", given.value, given.origin)
        draft.put("ppo.clip_high", given.value, given.origin)


def _mixture(draft: Draft) -> None:
    """TRL's beta of GKD: both ends are the KL divergences, not the mixture's limits."""
    for given in _taken(draft, "beta"):
        try:
            beta = float(given.value)
        except (TypeError, ValueError):
            raise ConfigError(f"{given.origin.where} is {given.value!r}, which is not a number") from None
        draft.put("distill.divergence", {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd"), given.origin)
        if beta not in (0.0, 1.0):
            draft.put("distill.beta", beta, given.origin)


def _algo(draft: Draft) -> None:
    for given in _taken(draft, "algo"):
        if given.value not in _ALGOS:
            raise ConfigError(f"{given.origin.where} is {given.value!r}; choose one of {', '.join(_ALGOS)}")
        preset = dict(_ALGOS[given.value])
        if given.value == "DAPO":
            longest = as_int(draft.value("rollout.max_new_tokens"), "rollout.max_new_tokens")
            preset["rollout.overlong_buffer"] = min(1024, longest // 4)
        for name, value in preset.items():
            _put_default(draft, name, value, given.origin)


def _put_default(draft: Draft, name: str, value: Any, origin: Origin) -> None:
    """A derived value that gives way to one the user gave."""
    if not draft.has(name):
        draft.put(name, value, origin)


def _hugging_face_batch(draft: Draft) -> None:
    """TRL's rule: the batch counts completions of one optimizer step, cut into forwards and ranks."""
    flags = _taken(draft, "per_device_train_batch_size", "gradient_accumulation_steps")
    if not flags:
        return
    rows = draft.number("per_device_train_batch_size", 8)
    accumulation = draft.number("gradient_accumulation_steps", 1)
    group = as_int(draft.value("rollout.num_generations"), "rollout.num_generations")
    updates = as_int(draft.value("rollout.updates_per_round"), "rollout.updates_per_round")
    completions = rows * accumulation * draft.world_size
    if completions % group:
        raise ConfigError(
            f"a step has {completions} completions (per_device_train_batch_size {rows} x gradient_accumulation_steps "
            f"{accumulation} x {draft.world_size} ranks), which num_generations {group} does not divide; "
            f"make their product a multiple of {group}"
        )
    draft.put("rollout.prompts_per_round", completions // group * updates, _at(*flags))
    _put_default(draft, "rollout.rows_per_forward", rows, _at(*flags))


def _colossal_batch(draft: Draft) -> None:
    """train_grpo.py: an episode collects prompts, then passes over their completions in batches."""
    own = _taken(draft, *_TRAIN_GRPO)
    if _is_rl_example(draft):
        return
    if not own:
        _without_collecting(draft)
        return
    flags = [*own, *_taken(draft, "num_episodes", "train_batch_size", "accumulation_steps")]
    prompts = (
        draft.number("num_collect_steps", 2) * draft.number("experience_batch_size", 16) * draft.world_size
    )
    group = as_int(draft.value("rollout.num_generations"), "rollout.num_generations")
    forward = draft.number("train_batch_size", 16)
    per_update = forward * draft.number("accumulation_steps", 8) * draft.world_size
    updates = min(max(1, round(prompts * group / per_update)), prompts)
    passes = draft.number("num_update_steps", 5)
    if updates * per_update != prompts * group:
        draft.warn(
            f"a round of {prompts * group} completions is cut into {updates} updates; --train_batch_size x "
            f"--accumulation_steps asked for {per_update} completions in each"
        )
    origin = _at(*flags)
    draft.put("rollout.prompts_per_round", prompts, origin)
    draft.put("rollout.updates_per_round", updates, origin)
    draft.put("rollout.epochs_per_round", passes, origin)
    _put_default(draft, "rollout.rows_per_forward", forward, origin)
    _put_default(draft, "train.max_steps", draft.number("num_episodes", 1) * updates * passes, origin)


def _without_collecting(draft: Draft) -> None:
    """Lines that name a batch but no collecting: count as Hugging Face's do."""
    for given in _taken(draft, "num_episodes"):
        draft.put("train.num_train_epochs", given.value, given.origin)
    for theirs, hf in (
        ("train_batch_size", "per_device_train_batch_size"),
        ("accumulation_steps", "gradient_accumulation_steps"),
    ):
        for given in _taken(draft, theirs):
            draft.put_together(hf, given.value, given.origin)
    if _taken(draft, "train_batch_size", "accumulation_steps"):
        _hugging_face_batch(draft)


def _ray_batch(draft: Draft) -> None:
    """rl_example.py: batches count prompts per rank; only its micro-batch counts completions."""
    if not _is_rl_example(draft):
        return
    for given in _taken(draft, "num_episodes"):
        draft.put("train.num_train_epochs", given.value, given.origin)
    sized = _taken(draft, "train_batch_size", "train_minibatch_size")
    if sized:
        prompts = draft.number("train_batch_size", 32)
        slice_ = draft.number("train_minibatch_size", prompts)
        if prompts % slice_:
            raise ConfigError(
                f"{_at(*sized).where}: {prompts} prompts cannot be cut into updates of {slice_}"
            )
        draft.put("rollout.prompts_per_round", prompts * draft.world_size, _at(*sized))
        draft.put("rollout.updates_per_round", prompts // slice_, _at(*sized))
    for given in _taken(draft, "train_microbatch_size"):
        draft.put("rollout.rows_per_forward", given.value, given.origin)
    for given in _taken(draft, "inference_microbatch_size"):
        group = as_int(draft.value("rollout.num_generations"), "rollout.num_generations")
        together = as_int(given.value, given.origin.where) * group
        draft.put("rollout.inference_batch_size", together, given.origin)
