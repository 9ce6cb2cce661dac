"""From another program's words to ours: each function takes what was given and returns what our setting takes.

What cannot be meant is a ValueError, which says what can be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from kitae.errors import ConfigError
from kitae.settings.draft import Given, as_bool

Convert = Callable[[Any], Any]


class Unset:
    """What a conversion returns when the other program means "not given" (`--max_steps -1`)."""


def switch(value: Any) -> bool:
    return as_bool(value, "it")


def choice(words: Mapping[str, Any]) -> Convert:
    """One of the other program's words."""

    def convert(value: Any) -> Any:
        word = str(value).lower()
        if word not in words:
            raise ValueError(f"choose one of {', '.join(words)}")
        return words[word]

    return convert


def unless(*unset: str) -> Convert:
    """The value itself, but for words by which the other program means "not given"."""
    return lambda value: Unset() if str(value).lower() in unset else value


def separated(value: Any) -> Any:
    """A list also written as one word with commas, as `q_proj,v_proj`."""
    if isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def unquoted(value: Any) -> Any:
    """The object that a JSON text stands for, as a command line has to write one; anything else as it is."""
    is_json = isinstance(value, str) and value.lstrip().startswith("{")
    return json.loads(value) if is_json else value


def paths_of(value: Any) -> list[str]:
    """Paths as a list, from a path, a list, or a mapping name -> path (a dict, or JSON text)."""
    value = unquoted(value)
    if isinstance(value, Mapping):
        return [str(path) for path in value.values()]
    return list(value) if isinstance(value, list | tuple) else [str(value)]


def texts_of(value: Any) -> list[str]:
    """A list of texts, or one of them; what is in one is never cut."""
    return list(value) if isinstance(value, list | tuple) else [str(value)]


def cached(value: Any) -> Any:
    return "cache" if switch(value) else Unset()


def sequence_level(value: Any) -> Unset:
    if switch(value):
        raise ValueError(
            "to learn from a teacher's texts, run kitae sample with the teacher, then kitae train sft on the file"
        )
    return Unset()


def checkpointing(value: Any) -> Any:
    word = str(value).lower()
    return True if word == "unsloth" else word if word in ("offload", "auto") else switch(value)


DTYPES = {
    "auto": "auto", "none": "auto", "bfloat16": "bfloat16", "bf16": "bfloat16", "torch.bfloat16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16", "torch.float16": "float16",
    "float32": "float32", "fp32": "float32", "float": "float32", "torch.float32": "float32",
}  # fmt: skip
OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "adamw_8bit",
    "adafactor": "adafactor",
}  # fmt: skip
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
LOG_LEVELS = {
    "debug": "debug", "info": "info", "passive": "info", "warning": "warning", "error": "warning", "critical": "warning"
}  # fmt: skip
METRICS = {
    "loss": "eval/loss", "eval_loss": "eval/loss", "eval_perplexity": "eval/perplexity", "perplexity": "eval/perplexity",
    "eval_rewards/accuracies": "eval/accuracy", "eval_rewards/margins": "eval/margin",
    "eval_accuracy": "eval/accuracy", "accuracy": "eval/accuracy", "eval_reward": "eval/reward", "reward": "eval/reward",
}  # fmt: skip
REWARDS = {
    "math_competition_reward_fn": "reasoning", "gsm8k_reward_fn": "reasoning", "reasoning": "reasoning"
}  # fmt: skip


def metric(value: Any) -> str:
    return METRICS.get(str(value), str(value))


def from_json(given: Given) -> Any:
    """A flag's value, read where it is the text of a JSON object (Any: whatever that holds)."""
    try:
        return unquoted(given.value)
    except ValueError as error:
        raise ConfigError(f"{given.origin.where} is {given.value!r}, which is not JSON: {error}") from error
