"""Write a policy as Hugging Face model folders or peft adapter folders; the caller gives a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kitae.errors import ModelError
from kitae.models.bars import bars_for
from kitae.models.lora import ADAPTER
from kitae.models.policy import VALUE_HEAD, Policy


def save_policy(
    policy: Policy,
    folder: str | Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    max_shard_gib: float = 5.0,
) -> list[Path]:
    """Write model or adapter in the precision it computes in, so that from_pretrained reads it; return the files.

    `tensors` replace parameters, by the names of named_trainable: whole tensors where the module holds shards.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for name, tensor in (tensors or {}).items() if not _is_value_head(name)}
    if policy.peft is not None:
        _save_adapter(policy, folder, tensors)
    else:
        _save_model(policy, folder, tensors, int(max_shard_gib * 2**30))
    return sorted(p for p in folder.iterdir() if p.is_file())


def _save_model(policy: Policy, folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    causal_lm = policy.causal_lm
    if getattr(causal_lm, "is_quantized", False):
        raise ModelError("a model in 4 bits is not written again; train and save an adapter on it")
    # Not state_dict's list: there a tied head would keep its old values under a second name.
    persistent = set(causal_lm.state_dict().keys())
    state = {name: value for name, value in causal_lm.named_buffers() if name in persistent}
    state |= {n: p for n, p in causal_lm.named_parameters() if not _is_value_head(n)}
    _check_names(tensors, state)
    state |= tensors
    parameters = {name for name, _ in causal_lm.named_parameters()}
    narrow = parameters - policy.float32_names
    whole = {n: _plain(v, policy.dtype if n in narrow else None) for n, v in state.items()}
    with bars_for(sum(tensor.nbytes for tensor in whole.values())):
        causal_lm.save_pretrained(folder, state_dict=whole, max_shard_size=max_shard_bytes)
    causal_lm.config.dtype = policy.dtype  # transformers wrote the module's, which may hold wider shards
    causal_lm.config.save_pretrained(folder)


def _save_adapter(policy: Policy, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    state = {n: p for n, p in policy.causal_lm.named_parameters() if p.requires_grad or f".{ADAPTER}." in n}
    state = {n: p for n, p in state.items() if not _is_value_head(n)}
    _check_names(tensors, state)
    prefix = "base_model.model."
    narrow = state.keys() - policy.float32_names
    whole = {
        prefix + n: _plain(v, policy.dtype if n in narrow else None) for n, v in {**state, **tensors}.items()
    }
    config = policy.peft.peft_config[ADAPTER]
    config.base_model_name_or_path = policy.base_name
    policy.peft.save_pretrained(
        folder, selected_adapters=[ADAPTER], state_dict=whole, save_embedding_layers=False
    )


def _is_value_head(name: str) -> bool:
    """Whether a parameter belongs to a shared critic's head, which models/value_head.py writes."""
    return name.startswith(f"{VALUE_HEAD}.")


def _check_names(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    unknown = sorted(tensors.keys() - known.keys())
    assert not unknown, f"no such parameters: {unknown[:3]}"


def _plain(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = value.detach()
    return tensor if dtype is None else tensor.to(dtype)
