"""What makes the unmodified transformers module fast, put in through its public extension points.

Attention over packed rows, routed experts as sorted slices, torch's fused RMSNorm; log-probs of only the tokens
that count are in heads.py. Each equals the plain module when off, and tests/models proves it.
"""

from __future__ import annotations

import types
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitae.models import attention
from kitae.types import Packing

NAME = "kitae"
"""What our functions are called in transformers' registries."""


class AttentionCache(Protocol):
    """Keys and values of earlier tokens, as a sampler keeps them."""

    def attend(
        self, layer_idx: int, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packing: Packing, scaling: float
    ) -> Tensor:
        """Store the new tokens' keys and values, and return their attention [T, Q, D of v]."""


def register() -> None:
    """Make our attention known to transformers under NAME; doing it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)


@torch.compiler.disable
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float,
    dropout: float = 0.0,
    kv_cache: AttentionCache | None = None,
    **_unused: Any,  # whatever else an architecture passes along; what would change the result is found at load
) -> tuple[Tensor, None]:
    """transformers' attention interface over one packed row: [1, heads, T, D] in, [1, T, heads, D] out."""
    q_TQD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    if kv_cache is not None:
        layer = module.layer_idx
        assert isinstance(layer, int), f"attention layer without a number: {layer!r}"
        return kv_cache.attend(layer, q_TQD, k_TKD, v_TKD, packing, scaling)[None], None
    out = attention.attend(q_TQD, k_TKD, v_TKD, packing, scaling=scaling, dropout=dropout)
    return out[None], None


def fuse_rmsnorms(model: nn.Module) -> int:
    """Let every plain RMSNorm of the model use torch's fused one; return how many there are.

    Whether a norm is plain is tried on random numbers: a norm that adds 1 to its weight, for one, stays as it is.
    """
    is_plain: dict[type, bool] = {}
    count = 0
    for module in model.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
            continue
        if kind not in is_plain:
            is_plain[kind] = _is_plain_rmsnorm(kind)
        if is_plain[kind]:
            # An instance attribute of nn.Module: the class, its name and its parameters stay transformers' own.
            module.forward = types.MethodType(_fused_rmsnorm, module)
            count += 1
    return count


def _fused_rmsnorm(self: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _is_plain_rmsnorm(kind: type) -> bool:
    generator = torch.Generator().manual_seed(0)
    try:
        norm = kind(48, eps=1e-5)
    except TypeError:  # a norm with other arguments is not a plain one
        return False
    if [name for name, _ in norm.named_parameters()] != ["weight"]:
        return False
    x = torch.randn(3, 48, generator=generator)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(48, generator=generator))
        return bool(torch.allclose(norm(x), _fused_rmsnorm(norm, x), rtol=1e-5, atol=1e-6))
