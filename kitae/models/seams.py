"""What makes the unmodified transformers module fast, put in through its public extension points.

Attention over packed rows (attention.py), routed experts as sorted slices (experts.py), norms, rotary embedding and
gates as one operation each (blocks.py); log-probs of only the tokens that count are in heads.py. Each equals the plain
module, which tests/models proves for the tested families; any other architecture is compared when it is loaded, and a
seam that differs stays off.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kitae.config import SeamSettings
from kitae.errors import ModelError
from kitae.models import attention, blocks, compared, embedding, experts, linear, native
from kitae.models.families import Family
from kitae.types import Packing

log = logging.getLogger(__name__)

NAME = "kitae"
"""What our functions are called in transformers' registries; those that compute by kernels have a name of their own."""
NATIVE_NAME = "kitae_kernels"
HARMLESS = {
    "position_ids",
    "use_cache",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}
"""What architectures pass to attention that does not change causal attention over packed rows."""


class AttentionCache(Protocol):
    """Keys and values of earlier tokens, as a sampler keeps them."""

    def attend(
        self, layer_idx: int, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packing: Packing, scaling: float
    ) -> Tensor:
        """Store the new tokens' keys and values, and return their attention [T, Q, D of v]."""


def install(causal_lm: Any, settings: SeamSettings, family: Family) -> SeamSettings:
    """Put the wanted seams into a transformers causal LM; return those really in use.

    The model must compute as loaded: no adapters yet, weights on their device.
    """
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    AttentionInterface.register(NAME, packed_attention)
    by_kernels = functools.partial(attention.attend, kernels=True)
    AttentionInterface.register(NATIVE_NAME, functools.partial(packed_attention, attend=by_kernels))
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts.experts_forward)
    ALL_EXPERTS_FUNCTIONS.register(NATIVE_NAME, functools.partial(experts.experts_forward, kernels=True))
    plain_TH = None
    has_logits = causal_lm.get_output_embeddings() is not None  # a critic has a score instead
    if not family.is_tested:
        if has_logits:
            compared.require_known_logits(causal_lm)
        plain_TH = compared.plain_hidden(causal_lm)
    device = next(causal_lm.parameters()).device
    use_kernels = settings.kernels and device.type == "cpu" and native.library() is not None
    triton = blocks.triton_kernels(causal_lm) if settings.kernels else None
    use_experts = _install_experts(causal_lm, settings, plain_TH, name=NATIVE_NAME if use_kernels else NAME)
    reason = compared.why_own_attention(causal_lm.config)
    if settings.attention and reason is None:
        reason = _try_attention(causal_lm, NATIVE_NAME if use_kernels else NAME, plain_TH)
    use_attention = settings.attention and reason is None
    if settings.attention and not use_attention:
        log.info("attention seam off, one row per forward: %s (%s)", reason, causal_lm.config.model_type)
    use_head = settings.head and compared.has_plain_head(causal_lm)
    if settings.head and has_logits and not use_head:
        log.info("head seam off: %s scales, caps or adapts its logits", causal_lm.config.model_type)
    if settings.rmsnorm:
        blocks.fuse_rmsnorms(causal_lm, kernels=use_kernels)
    if use_kernels:
        blocks.fuse_layers(causal_lm, attention_name=NATIVE_NAME)
        embedding.fuse_embedding(causal_lm)
        linear.fuse_linears(causal_lm.get_decoder())
    if triton is not None:
        blocks.fuse_layers(causal_lm, attention_name=NAME, kernels=triton)
    used = {"attention": use_attention, "head": use_head, "experts": use_experts}
    used["kernels"] = use_kernels or triton is not None
    return settings.model_copy(update=used)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
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
    attend: Callable[..., Tensor] = attention.attend,
    **others: Any,  # each architecture passes its own
) -> tuple[Tensor, None]:
    """transformers' attention interface over one packed row: [1, heads, T, D] in, [1, T, heads, D] out."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in HARMLESS)
    if unknown or attention_mask is not None:
        raise ModelError(
            f"{type(module).__name__} asks for {', '.join(unknown) or 'a mask'}, which packed attention has not; "
            "set model.seams.attention to false"
        )
    q_TQD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    if kv_cache is not None:
        layer = module.layer_idx
        assert isinstance(layer, int), f"attention layer without a number: {layer!r}"
        return kv_cache.attend(layer, q_TQD, k_TKD, v_TKD, packing, scaling)[None], None
    out = attend(q_TQD, k_TKD, v_TKD, packing, scaling=scaling, dropout=dropout)
    return out[None], None


def _try_attention(causal_lm: Any, name: str, plain_TH: Tensor | None) -> str | None:
    """Switch to packed attention; where it does not give what single rows gave, switch back and return why."""
    own = causal_lm.config._attn_implementation
    try:
        causal_lm.set_attn_implementation(name)
        if plain_TH is None or compared.is_close(
            compared.packed_hidden(causal_lm), plain_TH, causal_lm.dtype
        ):
            return None
        reason = "packed rows do not give what single rows give"
    except (ModelError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
    causal_lm.set_attn_implementation(own)
    return reason


def _install_experts(causal_lm: Any, settings: SeamSettings, plain_TH: Tensor | None, *, name: str) -> bool:
    modules = [m for m in causal_lm.modules() if hasattr(m, "_apply_gate") and hasattr(m, "num_experts")]
    if not modules:
        return settings.experts
    if not settings.experts:
        causal_lm.set_experts_implementation("eager")
        return False
    own = causal_lm.config._experts_implementation
    reason = None if all(map(experts.is_plain, modules)) else "experts of another layout"
    if reason is None:
        causal_lm.set_experts_implementation(name)
        if plain_TH is not None and not compared.is_close(
            compared.plain_hidden(causal_lm), plain_TH, causal_lm.dtype
        ):
            causal_lm.set_experts_implementation(own)
            reason = "sorted experts do not give what its own give"
    if reason is not None:
        log.info("experts seam off: %s (%s)", reason, causal_lm.config.model_type)
    return reason is None
