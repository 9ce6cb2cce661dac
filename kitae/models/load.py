"""From a name to a Policy and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kitae.config import LoraSettings, ModelSettings
from kitae.models import seams
from kitae.models.families import find_family
from kitae.models.policy import Policy, has_plain_head


def load_tokenizer(model: ModelSettings) -> Any:
    """The model's tokenizer as its tokenizer.json has it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(model.tokenizer or model.name_or_path)


def load_policy(model: ModelSettings, *, lora: LoraSettings | None = None, trainable: bool = True) -> Policy:
    """Load the model with its seams; see Policy."""
    from transformers import AutoModelForCausalLM

    seams.register()
    causal_lm = AutoModelForCausalLM.from_pretrained(
        Path(model.name_or_path),
        dtype=torch.float32,
        attn_implementation=seams.NAME if model.seams.attention else "sdpa",
        local_files_only=True,
    )
    if model.seams.rmsnorm:
        seams.fuse_rmsnorms(causal_lm)
    causal_lm.requires_grad_(trainable)
    used = model.seams.model_copy(update={"head": model.seams.head and has_plain_head(causal_lm)})
    family = find_family(causal_lm.config.model_type)
    return Policy(causal_lm, dtype=torch.float32, seams=used, family=family)
