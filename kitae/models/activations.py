"""What a forward pass keeps for its backward, from the model's configuration alone.

Per token and layer, as the seams compute it (kernels on a CPU; a GPU's fused operations keep about the same):

    attention  both sides of the norm, queries and keys as rotated (and as projected, where they are normed), values, output
    MLP        both sides of the norm, gate, up and their product; of routed experts gate and up alone (experts.py)

Without kernels on a CPU, torch's own operations keep float32 copies beside these: up to twice as much.
"""

from __future__ import annotations

from typing import Any

ROUTER_BYTES = 4
"""A router computes in float32 whatever the rest does."""


def activation_bytes(config: Any, *, num_tokens: int, element: int, recompute: bool = False) -> int:
    """About the bytes kept by a pass over num_tokens, for numbers of `element` bytes.

    `recompute` (model.gradient_checkpointing): each layer's input is kept, and the rest of one layer at a time. The
    matrices of adapters and the logits of one chunk do not count.
    """
    text = config.get_text_config()
    layers: list[int] = [_layer_bytes(text, number, element) for number in range(text.num_hidden_layers)]
    inputs: int = element * text.hidden_size
    kept = len(layers) * inputs + max(layers) if recompute else sum(layers)
    ends = 2 * inputs  # both sides of the final norm
    return num_tokens * (kept + ends)


def layer_input_bytes(config: Any, *, num_tokens: int, element: int) -> int:
    """Those of all layers' inputs, which is what recomputing begins from."""
    text = config.get_text_config()
    return int(num_tokens * text.num_hidden_layers * element * text.hidden_size)


def _layer_bytes(config: Any, number: int, element: int) -> int:
    """Of one token in one layer."""
    norms: int = 4 * config.hidden_size
    routed = _routed_experts(config, number)
    dense: int = _number(config, "intermediate_size") or 4 * config.hidden_size
    if not routed:
        return element * (norms + _attention(config) + 3 * dense)
    size = _number(config, "moe_intermediate_size") or dense
    mlp: int = 2 * size * _number(config, "num_experts_per_tok") + 3 * size * _number(
        config, "n_shared_experts"
    )
    router: int = ROUTER_BYTES * (config.hidden_size + routed)
    return element * (norms + _attention(config) + mlp) + router


def _attention(config: Any) -> int:
    """Numbers that attention keeps."""
    heads = _number(config, "num_attention_heads")
    if not heads:  # no attention that this sum knows, as in Mamba
        return 0
    if latent := _number(config, "kv_lora_rank"):  # latent attention, arXiv:2405.04434
        key_and_value: int = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return 2 * heads * key_and_value + 2 * (latent + _number(config, "q_lora_rank"))
    head: int = _number(config, "head_dim") or config.hidden_size // heads
    queries, keys = heads * head, (_number(config, "num_key_value_heads") or heads) * head
    copies = 3 if config.model_type.startswith("qwen3") else 2  # normed heads are kept before the norm too
    return copies * (queries + keys)


def _routed_experts(config: Any, number: int) -> int:
    """How many experts a layer routes to; 0 where its MLP is dense."""
    is_dense = number < _number(config, "first_k_dense_replace")
    is_dense = is_dense or number in (getattr(config, "mlp_only_layers", None) or [])
    return 0 if is_dense else _number(config, "n_routed_experts") or _number(config, "num_experts")


def _number(config: Any, name: str) -> int:
    """A whole number of the configuration; 0 where it has none, or one per layer."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0
