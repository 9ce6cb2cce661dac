"""Flags of programs of reinforcement learning that mean something only together: batch arithmetic, losses, references.

Each rule looks at draft.together, and puts our settings. Meanings are those of docs/flags.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kitae.errors import ConfigError
from kitae.settings.conversions import from_json, texts_of
from kitae.settings.draft import Draft, as_bool, as_int, origin_of

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
    """Run every rule of the recipe; each does nothing where its flags are absent."""
    for rule in _RULES.get(draft.command, ()):
        rule(draft)


def _generation_kwargs(draft: Draft) -> None:
    for given in draft.taken("generation_kwargs"):
        value = from_json(given)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{given.origin.where} is {given.value!r}; it takes a JSON object")
        for name, own in value.items():
            if name not in _GENERATION:
                raise ConfigError(f"{given.origin.where} has {name!r}; it takes {', '.join(_GENERATION)}")
            to = _GENERATION[name]
            draft.put(to, texts_of(own) if to == "rollout.stop" else own, given.origin)


def _is_rl_example(draft: Draft) -> bool:
    """Whether the line is one of rl_example.py: it has a flag, or the short spelling of one, that only it has."""
    short = (g.origin.where for g in draft.taken("train_batch_size", "inference_batch_size"))
    return any(name in draft.together for name in _RL_EXAMPLE) or any(w in ("-tbs", "-ibs") for w in short)


def _sampled_at_once(draft: Draft) -> None:
    for given in draft.taken("inference_batch_size"):
        if _is_rl_example(draft):
            draft.warn(
                f"{given.origin.where} has no effect: -tbs sizes a round, and -imbs what is sampled at once"
            )
        else:
            draft.put("rollout.inference_batch_size", given.value, given.origin)


def _loss_type(draft: Draft) -> None:
    for given in draft.taken("loss_type"):
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
    for given in draft.taken("sync_ref_model"):
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
        draft.put("grpo.ref_refresh_rounds", rounds, origin_of(given, *draft.taken("ref_model_sync_steps")))
    if "sync_ref_model" not in draft.together:
        for given in draft.taken("ref_model_sync_steps"):
            draft.warn(f"{given.origin.where} has no effect: --sync_ref_model is missing")


def _epsilon(draft: Draft) -> None:
    for given in draft.taken("epsilon"):
        draft.put("grpo.clip_low", given.value, given.origin)
        if "epsilon_high" not in draft.together:
            draft.put("grpo.clip_high", given.value, given.origin)
    for given in draft.taken("epsilon_high"):
        draft.put("grpo.clip_high", given.value, given.origin)


def _cliprange(draft: Draft) -> None:
    for given in draft.taken("cliprange"):
        draft.put("ppo.clip_low", given.value, given.origin)
        draft.put("ppo.clip_high", given.value, given.origin)


def _algo(draft: Draft) -> None:
    for given in draft.taken("algo"):
        if given.value not in _ALGOS:
            raise ConfigError(f"{given.origin.where} is {given.value!r}; choose one of {', '.join(_ALGOS)}")
        preset = dict(_ALGOS[given.value])
        if given.value == "DAPO":
            longest = as_int(draft.value("rollout.max_new_tokens"), "rollout.max_new_tokens")
            preset["rollout.overlong_buffer"] = min(1024, longest // 4)
        for name, value in preset.items():
            draft.put_default(name, value, given.origin)


def _hugging_face_batch(draft: Draft) -> None:
    """TRL's rule: the batch counts completions of one optimizer step, cut into forwards and ranks."""
    flags = draft.taken("per_device_train_batch_size", "gradient_accumulation_steps")
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
    draft.put("rollout.prompts_per_round", completions // group * updates, origin_of(*flags))
    draft.put_default("rollout.rows_per_forward", rows, origin_of(*flags))


def _colossal_batch(draft: Draft) -> None:
    """train_grpo.py: an episode collects prompts, then passes over their completions in batches."""
    own = draft.taken(*_TRAIN_GRPO)
    if _is_rl_example(draft):
        return
    if not own:
        _without_collecting(draft)
        return
    flags = [*own, *draft.taken("num_episodes", "train_batch_size", "accumulation_steps")]
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
    origin = origin_of(*flags)
    draft.put("rollout.prompts_per_round", prompts, origin)
    draft.put("rollout.updates_per_round", updates, origin)
    draft.put("rollout.epochs_per_round", passes, origin)
    draft.put_default("rollout.rows_per_forward", forward, origin)
    draft.put_default("train.max_steps", draft.number("num_episodes", 1) * updates * passes, origin)


def _without_collecting(draft: Draft) -> None:
    """Lines that name a batch but no collecting: count as Hugging Face's do."""
    for given in draft.taken("num_episodes"):
        draft.put("train.num_train_epochs", given.value, given.origin)
    for theirs, hf in (
        ("train_batch_size", "per_device_train_batch_size"),
        ("accumulation_steps", "gradient_accumulation_steps"),
    ):
        for given in draft.taken(theirs):
            draft.put_together(hf, given.value, given.origin)
    if draft.taken("train_batch_size", "accumulation_steps"):
        _hugging_face_batch(draft)


def _ray_batch(draft: Draft) -> None:
    """rl_example.py: batches count prompts per rank; only its micro-batch counts completions."""
    if not _is_rl_example(draft):
        return
    for given in draft.taken("num_episodes"):
        draft.put("train.num_train_epochs", given.value, given.origin)
    sized = draft.taken("train_batch_size", "train_minibatch_size")
    if sized:
        prompts = draft.number("train_batch_size", 32)
        slice_ = draft.number("train_minibatch_size", prompts)
        if prompts % slice_:
            raise ConfigError(
                f"{origin_of(*sized).where}: {prompts} prompts cannot be cut into updates of {slice_}"
            )
        draft.put("rollout.prompts_per_round", prompts * draft.world_size, origin_of(*sized))
        draft.put("rollout.updates_per_round", prompts // slice_, origin_of(*sized))
    for given in draft.taken("train_microbatch_size"):
        draft.put("rollout.rows_per_forward", given.value, given.origin)
    for given in draft.taken("inference_microbatch_size"):
        group = as_int(draft.value("rollout.num_generations"), "rollout.num_generations")
        together = as_int(given.value, given.origin.where) * group
        draft.put("rollout.inference_batch_size", together, given.origin)


_RULES: dict[str, tuple[Callable[[Draft], None], ...]] = {
    "grpo": (
        _sampled_at_once, _loss_type, _epsilon, _algo, _hugging_face_batch, _colossal_batch, _ray_batch,
        _reference_refresh, _generation_kwargs,
    ),
    "ppo": (_sampled_at_once, _cliprange, _hugging_face_batch, _colossal_batch, _ray_batch),
}  # fmt: skip
