"""What makes the unmodified transformers module fast, put in through its public extension points.

Attention over packed rows (attention.py), routed experts as sorted slices (experts.py), norms, rotary embedding and
gates as one operation each (blocks.py); log-probs of only the tokens that count are in heads.py. Each equals the plain
module, which tests/models proves for the tested families; any other architecture is compared when it is loaded, and a
seam that differs stays off.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kitae.config import SeamSettings
from kitae.errors import ModelError
from kitae.models import attention, blocks, experts, native
from kitae.models.families import Family
from kitae.types import Packing, Segment

log = logging.getLogger(__name__)

NAME = "kitae"
"""What our functions are called in transformers' registries; attention by kernels has a name of its own."""
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
ROWS = (11, 6, 9)
"""Lengths of the rows that seam and plain module are compared on; the last two share the first as their prompt."""


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

    AttentionInterface.register(NAME, _attention)
    AttentionInterface.register(NATIVE_NAME, functools.partial(_attention, kernels=True))
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts.experts_forward)
    plain_TH = None
    has_logits = causal_lm.get_output_embeddings() is not None  # a critic has a score instead
    if not family.is_tested:
        if has_logits:
            _require_known_logits(causal_lm)
        plain_TH = _plain_hidden(causal_lm)
    on_cpu = next(causal_lm.parameters()).device.type == "cpu"
    use_kernels = settings.kernels and on_cpu and native.library() is not None
    use_experts = _install_experts(causal_lm, settings, plain_TH)
    reason = _why_own_attention(causal_lm.config)
    if settings.attention and reason is None:
        reason = _try_attention(causal_lm, NATIVE_NAME if use_kernels else NAME, plain_TH)
    use_attention = settings.attention and reason is None
    if settings.attention and not use_attention:
        log.info("attention seam off, one row per forward: %s (%s)", reason, causal_lm.config.model_type)
    use_head = settings.head and has_plain_head(causal_lm)
    if settings.head and has_logits and not use_head:
        log.info("head seam off: %s scales, caps or adapts its logits", causal_lm.config.model_type)
    if settings.rmsnorm:
        blocks.fuse_rmsnorms(causal_lm, kernels=use_kernels)
    if use_kernels:
        blocks.fuse_layers(causal_lm, attention_name=NATIVE_NAME)
    used = {"attention": use_attention, "head": use_head, "experts": use_experts, "kernels": use_kernels}
    return settings.model_copy(update=used)


def has_plain_head(causal_lm: Any) -> bool:
    """Whether logits are the head's linear map of the hidden states and nothing else."""
    head = causal_lm.get_output_embeddings()
    return type(head) is nn.Linear and scaled_logits(torch.ones(1), causal_lm.config).item() == 1.0


def scaled_logits(logits_NV: Tensor, config: Any) -> Tensor:
    """Logits as the architecture means them: Granite's and Cohere's scales, Gemma's soft-cap."""
    if divisor := getattr(config, "logits_scaling", None):
        logits_NV = logits_NV / divisor
    if factor := getattr(config, "logit_scale", None):
        logits_NV = logits_NV * factor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits_NV = (logits_NV / cap).tanh() * cap
    return logits_NV


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    kernels: bool = False,
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
    out = attention.attend(q_TQD, k_TKD, v_TKD, packing, scaling=scaling, dropout=dropout, kernels=kernels)
    return out[None], None


def _why_own_attention(config: Any) -> str | None:
    """What in the configuration rules packed attention out; short rows would not show a window or a soft-cap."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        return "it attends in a sliding window"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    return None


def _try_attention(causal_lm: Any, name: str, plain_TH: Tensor | None) -> str | None:
    """Switch to packed attention; where it does not give what single rows gave, switch back and return why."""
    own = causal_lm.config._attn_implementation
    try:
        causal_lm.set_attn_implementation(name)
        if plain_TH is None or _is_close(_packed_hidden(causal_lm), plain_TH, causal_lm.dtype):
            return None
        reason = "packed rows do not give what single rows give"
    except (ModelError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
    causal_lm.set_attn_implementation(own)
    return reason


def _install_experts(causal_lm: Any, settings: SeamSettings, plain_TH: Tensor | None) -> bool:
    modules = [m for m in causal_lm.modules() if hasattr(m, "_apply_gate") and hasattr(m, "num_experts")]
    if not modules:
        return settings.experts
    if not settings.experts:
        causal_lm.set_experts_implementation("eager")
        return False
    own = causal_lm.config._experts_implementation
    reason = None if all(map(experts.is_plain, modules)) else "experts of another layout"
    if reason is None:
        causal_lm.set_experts_implementation(NAME)
        if plain_TH is not None and not _is_close(_plain_hidden(causal_lm), plain_TH, causal_lm.dtype):
            causal_lm.set_experts_implementation(own)
            reason = "sorted experts do not give what its own give"
    if reason is not None:
        log.info("experts seam off: %s (%s)", reason, causal_lm.config.model_type)
    return reason is None


def _plain_hidden(causal_lm: Any) -> Tensor:
    """Hidden states of the compared rows, each by itself through the module as transformers made it."""
    ids = _compared_ids(causal_lm)
    prompt, *others = torch.split(ids, list(ROWS))
    with torch.no_grad():
        whole = [_decode(causal_lm, prompt), *(_decode(causal_lm, torch.cat((prompt, o))) for o in others)]
    return torch.cat([whole[0], *(h[len(prompt) :] for h in whole[1:])])


def _packed_hidden(causal_lm: Any) -> Tensor:
    a, b, c = ROWS
    segments = [Segment(0, a), Segment(a, b, 0, a), Segment(a + b, c, 0, a)]
    positions = torch.cat([torch.arange(n) + start for n, start in ((a, 0), (b, a), (c, a))])
    packing = Packing(segments=segments, num_tokens=a + b + c)
    with torch.no_grad():
        return _decode(causal_lm, _compared_ids(causal_lm), positions=positions, packing=packing)


def _require_known_logits(causal_lm: Any) -> None:
    """Refuse an architecture whose own logits are not those that kitae makes of its hidden states."""
    ids = _compared_ids(causal_lm)[None].to(next(causal_lm.parameters()).device)
    with torch.no_grad():
        own_TV = causal_lm(input_ids=ids, use_cache=False).logits[0].float()
        hidden_TH = causal_lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits_TV = scaled_logits(causal_lm.get_output_embeddings()(hidden_TH).float(), causal_lm.config)
    if not _is_close(logits_TV, own_TV, causal_lm.dtype):
        raise ModelError(
            f"{causal_lm.config.model_type} models make their logits of hidden states in a way that kitae does not "
            "know, so its log-probs would be wrong; this architecture cannot be used"
        )


def _compared_ids(causal_lm: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, causal_lm.config.vocab_size, (sum(ROWS),), generator=generator)


def _decode(causal_lm: Any, ids: Tensor, *, positions: Tensor | None = None, **passed: Any) -> Tensor:
    device = next(causal_lm.parameters()).device
    positions = torch.arange(len(ids)) if positions is None else positions
    out = causal_lm.get_decoder()(
        input_ids=ids[None].to(device),
        position_ids=positions[None].to(device),
        attention_mask=None,
        use_cache=False,
        **passed,
    )
    hidden: Tensor = out.last_hidden_state[0].float()
    return hidden


def _is_close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to rounding in every row."""
    error = ((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-6)).max()
    return bool(error < (1e-4 if dtype == torch.float32 else 0.05))
