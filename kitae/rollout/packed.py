"""A policy's weights as the kernels read them (kernels/model.h).

The copy is made once and overwritten in place after every update. A LoRA adapter is added to its layer in float32 and
rounded once, to the compute dtype or to 8-bit integers. Dimension key: N outputs, K inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kitae.models.policy import Policy
from kitae.rollout import int8, structs
from kitae.rollout.merged import bias_of, merged_experts, merged_weight
from kitae.rollout.shapes import (
    BLOCK,
    LANES,
    compute_dtype,
    head_size,
    latent_sizes,
    mlp_linears,
    routing,
)
from kitae.rollout.structs import pointer

POSITIONS = 1024
"""The table of angles grows by this many positions."""


class PackedModel:
    """The packed weights, and `struct`, which points at them."""

    def __init__(
        self, policy: Policy, *, shares_embedding: bool = True, quantization: Literal["none", "int8"] = "none"
    ) -> None:
        """`shares_embedding`: the policy's own embedding is read where it can be; else all is as it was at `take`.

        With int8, linear weights are integers, the head's too: it adds a tenth to their error and saves more time than that.
        Not the router, whose rounded scores could choose another expert, and what latent attention multiplies with each head
        by itself.
        """
        config: Any = policy.config
        self._shares_embedding = shares_embedding
        self.is_int8 = quantization == "int8"
        self.dtype = compute_dtype(policy)
        self._angles_dtype = policy.dtype
        self.hidden_size: int = config.hidden_size
        self.query_heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_size = head_size(config)
        self.vocabulary: int = policy.causal_lm.get_output_embeddings().weight.shape[0]
        self.layers = (structs.Layer * len(policy.layers))()
        self._tensors: dict[str, Tensor] = {}
        self._rotary = policy.causal_lm.get_decoder().rotary_emb
        self._angles = torch.empty(0), torch.empty(0)
        self.num_taken = 0
        """How often weights were taken; keys and values are those of one time."""
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
            latent=latent_sizes(policy),
            routing=routing(policy),
        )

    @torch.no_grad()
    def take(self, policy: Policy) -> None:
        """Copy the policy's present weights; they must be whole on this rank."""
        self.num_taken += 1
        for number, (layer, block) in enumerate(zip(self.layers, policy.layers, strict=True)):
            attention: Any = block.self_attn
            if self.struct.latent.latent:
                layer.latent = self._latent(f"{number}.latent", attention, policy.config)
            else:
                projections = [attention.q_proj, attention.k_proj, attention.v_proj]
                layer.qkv = self._matrix(f"{number}.qkv", projections)
            layer.out = self._matrix(f"{number}.out", [attention.o_proj])
            if (linears := mlp_linears(block.mlp)) is not None:
                layer.gate_up = self._matrix(f"{number}.gate_up", linears[:2], interleave=True)
                layer.down = self._matrix(f"{number}.down", linears[2:])
            if hasattr(block.mlp, "experts"):
                layer.experts = self._experts(f"{number}.experts", block.mlp)
            layer.attention_norm = self._norm(f"{number}.attention_norm", block.input_layernorm)
            layer.mlp_norm = self._norm(f"{number}.mlp_norm", block.post_attention_layernorm)
            if hasattr(attention, "q_norm"):  # Qwen3
                layer.query_norm = self._norm(f"{number}.query_norm", attention.q_norm, multiple=LANES)
                layer.key_norm = self._norm(f"{number}.key_norm", attention.k_norm, multiple=LANES)
        self.struct.head = self._matrix("head", [policy.causal_lm.get_output_embeddings()])
        self.struct.final_norm = self._norm("final_norm", policy.causal_lm.get_decoder().norm)
        self._take_embedding(policy)

    def angles(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [positions, half a head] of `count` positions or more, rounded as the policy rounds them."""
        if count > len(self._angles[0]):
            positions = torch.arange(_round_up(count, POSITIONS))[None]
            angles = self._rotary(torch.zeros(1, dtype=self._angles_dtype), positions)
            if isinstance(angles, Tensor):  # DeepSeek-V2 makes complex numbers of them
                angles = (angles.real, angles.imag)
            half = self.head_size // 2
            cosines, sines = (table[0, :, :half].float().contiguous() for table in angles)
            self._angles = cosines, sines
        return self._angles

    def _matrix(self, name: str, linears: Sequence[Any], *, interleave: bool = False) -> structs.Matrix:
        """Linear layers of the same input, one below the other or (gates and ups) 32 columns in turn."""
        weights = [merged_weight(linear) for linear in linears]
        biases = [bias_of(linear) for linear in linears]
        has_bias = any(bias is not None for bias in biases)
        if has_bias:
            biases = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        weight_NK = _interleaved(weights) if interleave else torch.cat(weights)
        bias_N = None
        if has_bias:
            bias_N = _interleaved(biases) if interleave else torch.cat(biases)  # type: ignore[arg-type]
        return self._pack(name, [weight_NK], bias_N=bias_N)

    def _pack(
        self,
        name: str,
        weights: Iterable[Tensor],
        *,
        count: int = 1,
        bias_N: Tensor | None = None,
        keep: bool = False,
    ) -> structs.Matrix:
        """The first of `count` matrices [N, K] of one shape, whose packed weights lie one after the other.

        They become integers where the model's are, unless `keep` says to keep their type.
        """
        is_int8 = self.is_int8 and not keep
        q, dtype = (4, torch.int8) if is_int8 else (2 if self.dtype == torch.bfloat16 else 1, self.dtype)
        packed = scales = offsets = None
        columns = depth = 0
        for number, weight_NK in enumerate(weights):
            columns, depth = _round_up(weight_NK.shape[0], BLOCK), _round_up(weight_NK.shape[1], q)
            if is_int8:
                num_outputs = len(weight_NK)
                weight_NK, scales_N = int8.quantise(weight_NK)
                scales = self._tensor(f"{name}.scales", (count, columns), torch.float32)
                offsets = self._tensor(f"{name}.offsets", (count, columns), torch.int32)
                scales[number, :num_outputs] = scales_N
                offsets[number, :num_outputs] = 128 * weight_NK.sum(1, dtype=torch.int32)
            padding = (0, depth - weight_NK.shape[1], 0, columns - weight_NK.shape[0])
            padded = F.pad(weight_NK, padding).view(columns // BLOCK, BLOCK, depth // q, q)
            packed = self._tensor(name, (count, columns // BLOCK, depth // q, BLOCK, q), dtype)
            packed[number].copy_(padded.permute(0, 2, 1, 3))
        padded_N = None
        if bias_N is not None:
            padded_N = self._tensor(f"{name}.bias", (columns,), torch.float32)
            padded_N[: len(bias_N)] = bias_N
        return structs.Matrix(
            weights=pointer(packed),
            bias=pointer(padded_N),
            scales=pointer(scales),
            offsets=pointer(offsets),
            columns=columns,
            depth=depth,
        )

    def _latent(self, name: str, attention: Any, config: Any) -> structs.Latent:
        """Latent attention; what is rotated lies in halves, and kv_b_proj is cut into what queries and values meet."""
        sizes, heads = self.struct.latent, self.query_heads
        halves = torch.arange(sizes.rotated)
        if getattr(config, "rope_interleave", True):
            halves = torch.cat((halves[0::2], halves[1::2]))
        latent = structs.Latent()

        order = torch.cat((torch.arange(sizes.latent), sizes.latent + halves))
        weight_NK = merged_weight(attention.kv_a_proj_with_mqa)[order]
        bias_N = bias_of(attention.kv_a_proj_with_mqa)
        bias_N = None if bias_N is None else bias_N[order]
        if sizes.query_latent:
            padding = -sizes.query_latent % LANES
            weight_NK = torch.cat((F.pad(merged_weight(attention.q_a_proj), (0, 0, 0, padding)), weight_NK))
            first_N = bias_of(attention.q_a_proj)
            if bias_N is not None and first_N is not None:  # a model has both or none
                bias_N = torch.cat((F.pad(first_N, (0, padding)), bias_N))
            latent.query_norm = self._norm(f"{name}.query_norm", attention.q_a_layernorm, multiple=LANES)
        latent.down = self._pack(f"{name}.down", [weight_NK], bias_N=bias_N)
        latent.norm = self._norm(f"{name}.norm", attention.kv_a_layernorm, multiple=LANES)

        queries_NK = merged_weight(attention.q_b_proj if sizes.query_latent else attention.q_proj)
        order = torch.cat((torch.arange(sizes.plain), sizes.plain + halves))
        queries = queries_NK.view(heads, sizes.plain + sizes.rotated, -1)[:, order].flatten(0, 1)
        latent.queries = self._pack(f"{name}.queries", [queries])
        up = merged_weight(attention.kv_b_proj).view(heads, sizes.plain + sizes.value, -1)
        key_up, value_up = up[:, : sizes.plain].transpose(1, 2), up[:, sizes.plain :]
        latent.key_up = self._pack(f"{name}.key_up", key_up, count=heads, keep=True)
        latent.value_up = self._pack(f"{name}.value_up", value_up, count=heads, keep=True)
        return latent

    def _experts(self, name: str, mlp: Any) -> structs.Experts:
        """Routed experts; the router stays in float32, since a rounded score could choose another expert."""
        count = self.struct.routing.num_experts
        gate_up, down = (merged_experts(mlp.experts, n) for n in ("gate_up_proj", "down_proj"))
        router = self._tensor(f"{name}.router", (count, _round_up(self.hidden_size, BLOCK)), torch.float32)
        router[:, : self.hidden_size] = mlp.gate.weight.detach()
        bias = None
        if hasattr(mlp.gate, "e_score_correction_bias"):
            bias = self._tensor(f"{name}.bias", (count,), torch.float32)
            bias.copy_(mlp.gate.e_score_correction_bias)
        return structs.Experts(
            router=pointer(router),
            bias=pointer(bias),
            gate_up=self._pack(f"{name}.gate_up", (_interleaved(w.chunk(2)) for w in gate_up), count=count),
            down=self._pack(f"{name}.down", down, count=count),
        )

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
        is_own = rows_VH.data_ptr() != weight_VH.data_ptr()
        if not is_own and (not self._shares_embedding or hasattr(policy, "unshard")):
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
    def num_embeddings(self) -> int:
        """Token ids are below it."""
        return len(self._tensors["embedding"])

    @property
    def numbers_per_token(self) -> int:
        """What a layer keeps of a token in its pages."""
        return self.struct.latent.row or 2 * self.key_heads * self.head_size

    @property
    def bytes_per_token(self) -> int:
        """What all layers keep of a token."""
        return len(self.layers) * self.numbers_per_token * self.dtype.itemsize


def _interleaved(parts: Sequence[Tensor]) -> Tensor:
    """Gates and ups, half a block of each in turn, both with zeros up to whole halves."""
    half = BLOCK // 2
    padding = -len(parts[0]) % half
    halves = [F.pad(p, (0,) * (2 * p.dim() - 1) + (padding,)).view(-1, half, *p.shape[1:]) for p in parts]
    return torch.stack(halves, dim=1).flatten(0, 2)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
