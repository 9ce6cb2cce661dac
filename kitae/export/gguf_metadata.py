"""What a GGUF file says about a model besides its tensors: sizes, attention, experts, rotary positions.

config.json's fields, in transformers' spelling of version 4 or 5 --model_metadata--> keys as llama.cpp reads them
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kitae.errors import ModelError

log = logging.getLogger(__name__)


def model_metadata(writer: Any, config: Mapping[str, Any], *, vocab_size: int) -> None:
    """Write a model's hyperparameters to a gguf.GGUFWriter, which is typed Any because it is an extra's.

    What llama.cpp computes otherwise than the model is refused.
    """
    _refuse_other_meanings(config)
    heads = int(config["num_attention_heads"])
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    if "kv_lora_rank" in config:
        _latent_attention(writer, config)
    else:
        size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
        writer.add_key_length(size)
        writer.add_value_length(size)
        writer.add_rope_dimension_count(size)
    if config["model_type"] == "qwen3_moe":
        writer.add_expert_count(num_experts(config))
        writer.add_expert_used_count(int(config["num_experts_per_tok"]))
        writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
    _rope(writer, config)


def num_experts(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer, 0 without any; the name differs by model and by transformers' version."""
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _refuse_other_meanings(config: Mapping[str, Any]) -> None:
    model_type = config["model_type"]
    unlike: list[tuple[str, Any, Callable[[Any], bool]]] = [
        ("hidden_act", "silu", lambda v: v == "silu"),
        ("partial_rotary_factor", 1.0, lambda v: v == 1.0),
        ("use_sliding_window", False, lambda v: not v),
    ]
    if "kv_lora_rank" in config:
        unlike += [("rope_interleave", True, bool), ("attention_bias", False, lambda v: not v)]
    if model_type == "qwen3_moe":
        unlike += [
            ("norm_topk_prob", True, bool),
            ("decoder_sparse_step", 1, lambda v: v == 1),
            ("mlp_only_layers", [], lambda v: not v),
        ]
    for name, default, is_fine in unlike:
        if not is_fine(config.get(name, default)):
            raise ModelError(
                f"config.json has {name} {config[name]!r}; llama.cpp computes {model_type} with {default!r} only"
            )


def _latent_attention(writer: Any, config: Mapping[str, Any]) -> None:
    """DeepSeek's MLA, which llama.cpp runs with one key head (arXiv:2405.04434, section 2.1), and its experts."""
    import gguf

    rank, rope = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
    writer.add_head_count_kv(1)
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(int(config["q_lora_rank"]))
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(int(config["qk_nope_head_dim"]) + rope)
    writer.add_value_length_mla(int(config["v_head_dim"]))
    writer.add_rope_dimension_count(rope)
    groups = int(config.get("n_group") or 1)
    is_v3 = config["model_type"] == "deepseek_v3"
    if groups > 1 and not is_v3:
        log.warning(
            "llama.cpp chooses among DeepSeek-V2's groups of experts as V3 does, by the best two of each; the model takes "
            "the best one"
        )
    writer.add_leading_dense_block_count(int(config.get("first_k_dense_replace") or 0))
    writer.add_expert_count(num_experts(config))
    writer.add_expert_used_count(int(config["num_experts_per_tok"]))
    writer.add_expert_shared_count(int(config.get("n_shared_experts") or 0))
    writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
    writer.add_expert_weights_scale(float(config.get("routed_scaling_factor") or 1.0))
    writer.add_expert_weights_norm(bool(config.get("norm_topk_prob")))
    gating = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(gating.SIGMOID if is_v3 else gating.SOFTMAX)
    if groups > 1:
        writer.add_expert_group_count(groups)
        writer.add_expert_group_used_count(int(config["topk_group"]))


def _rope(writer: Any, config: Mapping[str, Any]) -> None:
    kind, rope = _rope_of(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"config.json has partial_rotary_factor {rope['partial_rotary_factor']}; llama.cpp turns whole heads of "
            f"{config['model_type']}"
        )
    if kind == "llama3" and config["model_type"] != "llama":
        raise ModelError(
            f"config.json has rope_type 'llama3'; llama.cpp computes {config['model_type']} without it"
        )
    if kind in ("default", "llama3"):  # llama3's change is a tensor of its own
        return
    if kind not in ("linear", "yarn"):
        raise ModelError(f"config.json has rope_type {kind!r}, which kitae does not write to GGUF")
    import gguf

    factor = float(rope["factor"])
    writer.add_rope_scaling_factor(factor)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        return
    # arXiv:2309.00071
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(int(original))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    all_dims = rope.get("mscale_all_dim")
    if "kv_lora_rank" in config and all_dims:
        if rope.get("mscale", 1.0) != all_dims:
            raise ModelError(
                f"config.json has yarn's mscale {rope.get('mscale', 1.0)} and mscale_all_dim {all_dims}; llama.cpp "
                "computes with equal ones only"
            )
        writer.add_rope_scaling_yarn_log_mul(0.1 * float(all_dims))
    usual = 0.1 * math.log(factor) + 1
    if abs((rope.get("attention_factor") or usual) - usual) > 1e-6:
        raise ModelError(
            f"config.json has yarn's attention_factor {rope['attention_factor']}; llama.cpp computes with {usual:.6g}"
        )


def _rope_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(rope_type, its settings); transformers 5 keeps all in rope_parameters."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **scaling}
    return str(rope.get("rope_type") or rope.get("type") or "default"), rope


def llama3_factors(config: Mapping[str, Any]) -> Tensor | None:
    """By what llama3's rope_type divides each frequency: 1 for short wave lengths, `factor` for long ones."""
    kind, rope = _rope_of(config)
    if kind != "llama3":
        return None
    size = int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))
    frequency = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    waves = float(rope["original_max_position_embeddings"]) * frequency / (2 * math.pi)
    # How far between the two, in waves within that length.
    smooth = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
