"""The score head of a sequence classifier with one label: found, checked, made anew, and kept in float32."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from kitae.errors import ModelError
from kitae.models.files import ModelFiles, read_json, weight_files
from kitae.models.lora import ADAPTER, finish, without_peft_chatter

WEIGHT = "score.weight"
"""Name of the head in transformers' ...ForSequenceClassification of decoder models."""


def check(folder: Path, weights: Mapping[str, Path], config: Any, *, is_wanted: bool) -> None:
    """Refuse a classifier where a language model is asked for, and one of several labels where a score is.

    A language model is taken as the start of a critic: `config` is told that the head has one label.
    """
    if not is_wanted:
        if WEIGHT in weights:
            raise ModelError(
                f"{folder} is a reward model or another classifier (it has {WEIGHT}), not a language model; name the "
                "model it was made of"
            )
        return
    if WEIGHT in weights and config.num_labels != 1:
        raise ModelError(
            f"{folder} is a classifier of {config.num_labels} labels; a reward model has one (num_labels 1)"
        )
    config.problem_type = None
    config.num_labels = 1


def has_score(found: ModelFiles) -> bool:
    """Whether a folder, or the adapter in it, holds a score: a reward model, and no language model."""
    if found.adapter is not None:
        return read_json(found.adapter / "adapter_config.json").get("task_type") == "SEQ_CLS"
    return WEIGHT in weight_files(found.folder)


def prepare(classifier: Any, weights: Mapping[str, Path]) -> None:
    """Put the head in float32; a new one starts at zero.

    At zero every score is 0 and the first loss is known (log 2 for pairs); the first gradient moves the head alone, so
    a random head does not push the trained layers below it about (arXiv:2202.10054).
    """
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ModelError(
            f"the {classifier.config.model_type} classifier of transformers has no linear layer `score` of one output"
        )
    head.float()
    with torch.no_grad():
        if WEIGHT in weights:
            # transformers has rounded it to the dtype of the layers.
            with safe_open(weights[WEIGHT], framework="pt") as opened:
                head.weight.copy_(opened.get_tensor(WEIGHT))
        else:
            nn.init.zeros_(head.weight)


@contextmanager
def without_load_report() -> Iterator[None]:
    """Inside it transformers does not tell that a language model has no score, and that its plans do not name one."""
    names = ("modeling_utils", "distributed.tensor_parallel")
    loggers = [logging.getLogger(f"transformers.{name}") for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def load_adapter(
    classifier: Any, folder: Path, *, trainable: bool, dtype: torch.dtype
) -> tuple[Any, str | None]:
    """Put an adapter on a classifier: a reward model's with its head, or a language model's, which gets a new head.

    Returned are peft's wrapper and None: a critic keeps no copy of the adapter it started from.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    config: Any = LoraConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", None, not trainable
    state = {}
    for file in sorted(set(weight_files(folder).values())):
        state.update(load_file(file))
    state.setdefault(f"base_model.model.{WEIGHT}", classifier.score.weight.detach())
    with without_peft_chatter():
        wrapper = get_peft_model(classifier, config, autocast_adapter_dtype=False)
        result: Any = set_peft_model_state_dict(wrapper, state, adapter_name=ADAPTER)
    if result.unexpected_keys:
        raise ModelError(
            f"{folder} has adapter weights that fit nothing here, such as {result.unexpected_keys[0]}"
        )
    finish(classifier, dtype)
    return wrapper, None
