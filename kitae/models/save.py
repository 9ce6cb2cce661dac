"""Write a policy as Hugging Face or peft folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kitae.models.policy import Policy


def save_policy(
    policy: Policy, folder: Path, *, tensors: Mapping[str, Tensor] | None = None, max_shard_gib: float = 5.0
) -> list[Path]:
    """Write the model so that from_pretrained reads it; `tensors` replace parameters by named_trainable's names."""
    state = {**policy.causal_lm.state_dict(), **(tensors or {})}
    policy.causal_lm.save_pretrained(folder, state_dict=state, max_shard_size=int(max_shard_gib * 2**30))
    return sorted(p for p in Path(folder).iterdir() if p.is_file())
