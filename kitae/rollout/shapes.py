"""Which policies the kernels can run, and what they have to know of one besides its weights (kernels/model.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kitae.models import experts
from kitae.models.policy import Policy
from kitae.rollout import structs
from kitae.rollout.int8 import MOST_INPUTS
from kitae.rollout.merged import inner_experts, why_not_experts, why_not_linear

LATENT_TYPES = ("deepseek_v2", "deepseek_v3")
"""Model types with latent attention."""
MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe", "llama", *LATENT_TYPES)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary scaling whose angles depend on the position alone."""
BLOCK = 64
"""Output columns that lie together."""
LANES = 16


def why_not_native(policy: Policy) -> str | None:
    """Why the kernels cannot run this policy, or None where they can."""
    config: Any = policy.config
    if policy.device.type != "cpu":
        return f"it runs on {policy.device.type}, and the kernels are for CPUs"
    if config.model_type not in MODEL_TYPES:
        return f"{config.model_type} is none of {', '.join(MODEL_TYPES)}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "some of its layers attend in a window"
    if not policy.seams.attention:
        return "model.seams.attention is off"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    embedding, head = policy.causal_lm.get_input_embeddings(), policy.causal_lm.get_output_embeddings()
    if len(head.weight) > len(embedding.weight):
        return f"its head has {len(head.weight):,} outputs, and its embedding {len(embedding.weight):,} rows"
    rope = policy.causal_lm.get_decoder().rotary_emb
    if rope.rope_type not in ROPE_TYPES:
        return f"its rotary embedding is {rope.rope_type}"
    if reason := _why_not_heads(config, num_rotated=2 * rope.inv_freq.numel()):
        return reason
    if reason := next(filter(None, map(why_not_linear, _linears(policy))), None):
        return reason
    if reason := next(filter(None, map(_why_not_routed, routed_layers(policy))), None):
        return reason
    return _why_not_routing(routing(policy))


def why_not_int8(policy: Policy) -> str | None:
    """Why its weights cannot be 8-bit integers, or None where they can."""
    inner: list[Any] = [inner_experts(mlp.experts) for mlp in routed_layers(policy)]
    sizes = [linear.in_features for linear in _linears(policy)] + [m.down_proj.shape[-1] for m in inner]
    if max(sizes) > MOST_INPUTS:
        return f"one of its layers has {max(sizes):,} inputs, and integer sums hold no more than {MOST_INPUTS:,} products"
    return None


def compute_dtype(policy: Policy) -> torch.dtype:
    """What the kernels compute a policy in: float16 weights become float32, which holds each of them exactly."""
    return torch.float32 if policy.dtype == torch.float16 else policy.dtype


def head_size(config: Any) -> int:
    """Numbers in a head's query; of latent attention, those that are rotated."""
    if config.model_type in LATENT_TYPES:
        return int(config.qk_rope_head_dim)
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def latent_sizes(policy: Policy) -> structs.LatentSizes:
    """All zero where attention is not latent."""
    config: Any = policy.config
    if config.model_type not in LATENT_TYPES:
        return structs.LatentSizes()
    first: Any = policy.layers[0]
    return structs.LatentSizes(
        query_latent=config.q_lora_rank or 0,
        latent=config.kv_lora_rank,
        rotated=config.qk_rope_head_dim,
        plain=config.qk_nope_head_dim,
        value=config.v_head_dim,
        row=-(-(config.kv_lora_rank + config.qk_rope_head_dim) // 32) * 32,
        norm_epsilon=first.self_attn.kv_a_layernorm.variance_epsilon,
    )


def routed_layers(policy: Policy) -> list[Any]:
    """The MLPs that have routed experts."""
    mlps: list[Any] = [block.mlp for block in policy.layers]
    return [mlp for mlp in mlps if hasattr(mlp, "experts")]


def routing(policy: Policy) -> structs.Routing:
    """How the router of each layer chooses, read from the first one; all zero where there is none."""
    layers: list[Any] = routed_layers(policy)
    config: Any = policy.config
    if not layers:
        return structs.Routing()
    gate = layers[0].gate
    chosen = structs.Routing(
        num_experts=gate.weight.shape[0],
        num_chosen=gate.top_k,
        num_groups=1,
        num_open_groups=1,
        best_of_group=1,
        scale=getattr(gate, "routed_scaling_factor", 1.0),
    )
    if config.model_type != "deepseek_v2":  # whose module does not look at norm_topk_prob
        chosen.is_normalised = gate.norm_topk_prob
    if config.model_type == "deepseek_v3":
        chosen.is_sigmoid, chosen.best_of_group = 1, 2
    if config.model_type == "deepseek_v3" or getattr(gate, "topk_method", "") == "group_limited_greedy":
        chosen.num_groups, chosen.num_open_groups = gate.num_group, gate.topk_group
    return chosen


def _why_not_heads(config: Any, *, num_rotated: int) -> str | None:
    size = head_size(config)
    if num_rotated != size:
        return f"{num_rotated} of the {size} numbers of its heads are rotated"
    if config.model_type not in LATENT_TYPES:
        return f"its head size is {size}, which {LANES} does not divide" if size % LANES else None
    divisors = {"kv_lora_rank": LANES, "v_head_dim": LANES, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2}
    for name, divisor in divisors.items():
        if getattr(config, name) % divisor:
            return f"its {name} is {getattr(config, name)}, which {divisor} does not divide"
    return None


def _why_not_routed(mlp: Any) -> str | None:
    if reason := why_not_experts(mlp.experts):
        return reason
    if not experts.is_plain(inner_experts(mlp.experts)):
        return "its experts have another layout than gate, up and down without biases"
    if (method := getattr(mlp.gate, "topk_method", "greedy")) not in ("greedy", "group_limited_greedy"):
        return f"its topk_method is {method}"
    return None


def _why_not_routing(how: structs.Routing) -> str | None:
    if how.num_chosen and (
        how.num_experts % how.num_groups
        or how.num_chosen > how.num_experts // how.num_groups * how.num_open_groups
    ):
        return (
            f"its {how.num_experts} experts, {how.num_open_groups} of {how.num_groups} groups open, are too few to choose "
            f"{how.num_chosen}"
        )
    return None


def mlp_linears(mlp: Any) -> tuple[Any, Any, Any] | None:
    """gate, up and down of what every token goes through: a dense MLP, or shared experts; None where there are none."""
    shared = getattr(mlp, "shared_experts", None) if hasattr(mlp, "experts") else mlp
    if shared is None or shared.up_proj.weight.shape[0] == 0:
        return None
    return shared.gate_proj, shared.up_proj, shared.down_proj


def _linears(policy: Policy) -> list[Any]:
    names = (
        "q_proj",
        "k_proj",
        "v_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "o_proj",
    )
    found: list[Any] = [policy.causal_lm.get_output_embeddings()]
    for block in policy.layers:
        attention: Any = block.self_attn
        found += [linear for name in names if isinstance(linear := getattr(attention, name, None), nn.Module)]
        found += mlp_linears(block.mlp) or ()
    return found
