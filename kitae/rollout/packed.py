"""A policy's weights as the kernels read them (kernels/model.h), and which policies have that form.

The copy is made once and overwritten in place after every update. A LoRA adapter is added to its layer in float32 and
rounded once to the compute dtype. Dimension key: N outputs, K inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitae.models.policy import Policy
from kitae.rollout import structs
from kitae.rollout.structs import pointer

MODEL_TYPES = ("qwen2", "qwen3", "llama")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary scaling whose angles depend on the position alone."""
BLOCK = 64
"""Output columns that lie together."""
LANES = 16
POSITIONS = 1024
"""The table of angles grows by this many positions."""


def why_not_native(policy: Policy) -> str | None:
    """Why the kernels cannot run this policy, or None where they can."""
    config: Any = policy.config
    if policy.device.type != "cpu":
        return f"it runs on {policy.device.type}, and the kernels are for CPUs"
    if policy.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in {str(policy.dtype).removeprefix('torch.')}"
    if config.model_type not in MODEL_TYPES:
        return f"{config.model_type} is none of {', '.join(MODEL_TYPES)}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "some of its layers attend in a window"
    if not policy.seams.attention:
        return "model.seams.attention is off"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    rope = policy.causal_lm.get_decoder().rotary_emb
    if rope.rope_type not in ROPE_TYPES:
        return f"its rotary embedding is {rope.rope_type}"
    size = _head_size(config)
    if size % LANES or 2 * rope.inv_freq.numel() != size:
        return f"its head size is {size}, which {LANES} does not divide, or only a part of it is rotated"
    return next(filter(None, map(_why_not_linear, _linears(policy))), None)


class PackedModel:
    """The packed weights, and `struct`, which points at them."""

    def __init__(self, policy: Policy) -> None:
        config: Any = policy.config
        self.dtype = policy.dtype
        self.hidden_size: int = config.hidden_size
        self.query_heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_size = _head_size(config)
        self.vocabulary: int = policy.causal_lm.get_output_embeddings().weight.shape[0]
        self.layers = (structs.Layer * len(policy.layers))()
        self._tensors: dict[str, Tensor] = {}
        self._rotary = policy.causal_lm.get_decoder().rotary_emb
        self._num_positions = 0
        first: Any = policy.layers[0]
        self.struct = structs.Model(
            layers=self.layers,
            num_layers=len(self.layers),
            hidden_size=self.hidden_size,
            query_heads=self.query_heads,
            key_heads=self.key_heads,
            head_size=self.head_size,
            vocabulary=self.vocabulary,
            norm_epsilon=first.input_layernorm.variance_epsilon,
            attention_scale=first.self_attn.scaling,
        )

    @torch.no_grad()
    def take(self, policy: Policy) -> None:
        """Copy the policy's present weights; they must be whole on this rank."""
        for number, (layer, block) in enumerate(zip(self.layers, policy.layers, strict=True)):
            attention: Any = block.self_attn
            mlp: Any = block.mlp
            layer.qkv = self._matrix(f"{number}.qkv", [attention.q_proj, attention.k_proj, attention.v_proj])
            layer.out = self._matrix(f"{number}.out", [attention.o_proj])
            layer.gate_up = self._matrix(f"{number}.gate_up", [mlp.gate_proj, mlp.up_proj], interleave=True)
            layer.down = self._matrix(f"{number}.down", [mlp.down_proj])
            layer.attention_norm = self._norm(f"{number}.attention_norm", block.input_layernorm)
            layer.mlp_norm = self._norm(f"{number}.mlp_norm", block.post_attention_layernorm)
            if hasattr(attention, "q_norm"):  # Qwen3
                layer.query_norm = self._norm(f"{number}.query_norm", attention.q_norm, multiple=LANES)
                layer.key_norm = self._norm(f"{number}.key_norm", attention.k_norm, multiple=LANES)
        self.struct.head = self._matrix("head", [policy.causal_lm.get_output_embeddings()])
        self.struct.final_norm = self._norm("final_norm", policy.causal_lm.get_decoder().norm)
        self._take_embedding(policy)

    def require_positions(self, count: int) -> None:
        """Make the table of angles long enough. They are rounded as the policy rounds them."""
        if count <= self._num_positions:
            return
        self._num_positions = -(-count // POSITIONS) * POSITIONS
        positions = torch.arange(self._num_positions)[None]
        angles = self._rotary(torch.zeros(1, dtype=self.dtype), positions)
        half = self.head_size // 2
        for name, table in zip(("cosines", "sines"), angles, strict=True):
            self._tensors[name] = table[0, :, :half].float().contiguous()
            setattr(self.struct, name, pointer(self._tensors[name]))

    def _matrix(self, name: str, linears: Sequence[Any], *, interleave: bool = False) -> structs.Matrix:
        """Linear layers of the same input, one below the other or (gates and ups) 32 columns in turn."""
        weights = [merged_weight(linear) for linear in linears]
        biases = [_bias(linear) for linear in linears]
        has_bias = any(bias is not None for bias in biases)
        if has_bias:
            biases = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        weight_NK = _interleaved(weights) if interleave else torch.cat(weights)
        columns, depth, q = _round_up(weight_NK.shape[0], BLOCK), weight_NK.shape[1], self._q
        depth = _round_up(depth, q)
        weight_NK = F.pad(weight_NK, (0, depth - weight_NK.shape[1], 0, columns - weight_NK.shape[0]))
        packed = self._tensor(name, (columns // BLOCK, depth // q, BLOCK, q), self.dtype)
        packed.copy_(weight_NK.view(columns // BLOCK, BLOCK, depth // q, q).permute(0, 2, 1, 3))
        bias_N = None
        if has_bias:
            joined = _interleaved(biases) if interleave else torch.cat(biases)  # type: ignore[arg-type]
            bias_N = self._tensor(f"{name}.bias", (columns,), torch.float32)
            bias_N[: len(joined)] = joined
        return structs.Matrix(pointer(packed), pointer(bias_N), columns, depth)

    def _norm(self, name: str, norm: Any, *, multiple: int = BLOCK) -> int | None:
        """A norm's weights in float32, with zeros up to a multiple."""
        weight: Tensor = norm.weight.detach()
        tensor = self._tensor(name, (_round_up(len(weight), multiple),), torch.float32)
        tensor[: len(weight)] = weight
        return pointer(tensor)

    def _take_embedding(self, policy: Policy) -> None:
        """Read the policy's own rows where they stay as the kernels want them, else a copy."""
        weight_VH = policy.causal_lm.get_input_embeddings().weight.detach()
        rows_VH = weight_VH.to(self.dtype).contiguous()
        if hasattr(policy, "unshard") and rows_VH.data_ptr() == weight_VH.data_ptr():
            rows_VH = rows_VH.clone()  # FSDP frees what it gathered
        self._tensors["embedding"] = rows_VH
        self.struct.embedding = pointer(rows_VH)
        self.struct.embedding_stride = rows_VH.shape[1]

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of this name, made on first use, zeros at first."""
        if name not in self._tensors:
            self._tensors[name] = torch.zeros(shape, dtype=dtype)
        return self._tensors[name]

    @property
    def _q(self) -> int:
        return 2 if self.dtype == torch.bfloat16 else 1


def merged_weight(linear: Any) -> Tensor:
    """A linear layer's weight [N, K] with its active adapters added in float32."""
    if type(linear) is nn.Linear:
        return linear.weight.detach()
    weight_NK: Tensor = linear.base_layer.weight.detach()
    if linear.disable_adapters:
        return weight_NK
    for name in linear.active_adapters:
        if name in linear.lora_A:
            a, b = linear.lora_A[name].weight.detach().float(), linear.lora_B[name].weight.detach().float()
            weight_NK = torch.addmm(weight_NK.float(), b, a, alpha=linear.scaling[name])
    return weight_NK


def _bias(linear: Any) -> Tensor | None:
    bias = linear.bias if type(linear) is nn.Linear else linear.base_layer.bias
    return None if bias is None else bias.detach()


def _why_not_linear(linear: Any) -> str | None:
    if type(linear) is nn.Linear:
        return None
    from peft.tuners.lora.layer import Linear as LoraLinear

    if type(linear) is not LoraLinear or type(linear.base_layer) is not nn.Linear:
        kind = type(getattr(linear, "base_layer", linear)).__name__
        return f"its weights are packed from plain linear layers, and this one has {kind}"
    if linear.lora_variant or any(linear.lora_bias.values()) or linear.merged:
        return "its adapter is more than two matrices"
    return None


def _linears(policy: Policy) -> list[Any]:
    found: list[Any] = [policy.causal_lm.get_output_embeddings()]
    for block in policy.layers:
        attention: Any = block.self_attn
        mlp: Any = block.mlp
        found += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        found += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return found


def _interleaved(parts: Sequence[Tensor]) -> Tensor:
    """Gates and ups, half a block of each in turn, both with zeros up to whole halves."""
    half = BLOCK // 2
    padding = -len(parts[0]) % half
    halves = [F.pad(p, (0,) * (2 * p.dim() - 1) + (padding,)).view(-1, half, *p.shape[1:]) for p in parts]
    return torch.stack(halves, dim=1).flatten(0, 2)


def _head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
