"""Room for what the kernels compute on the way from tokens to logits (Scratch of kernels/model.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from kitae.rollout import structs
from kitae.rollout.packed import PackedModel
from kitae.rollout.shapes import BLOCK, LANES
from kitae.rollout.structs import pointer

INPUTS = ("normed", "attended", "activated", "query_latents", "expert_rows", "expert_activated")
"""What is multiplied with linear weights."""


def make_scratch(
    model: PackedModel, *, tokens: int, logits: int
) -> tuple[structs.Scratch, Tensor, list[Tensor]]:
    """Room for a pass of so many tokens and for so many rows of logits.

    Returned are the struct, the logits [rows, vocabulary], and all tensors, which must live as long as the struct.
    """
    buffers = {
        name: torch.empty(rows, width, dtype=dtype)
        for name, (rows, width, dtype) in _shapes(model, tokens=tokens, logits=logits).items()
    }
    strides = [name for name, _ in structs.Scratch._fields_ if name.endswith("_stride")]
    struct = structs.Scratch(
        **{name: pointer(buffer) for name, buffer in buffers.items()},
        **{s: buffers[n].shape[1] for s in strides if (n := s.removesuffix("_stride")) in buffers},
    )
    return struct, buffers["logits"][:, : model.vocabulary], list(buffers.values())


def _shapes(model: PackedModel, *, tokens: int, logits: int) -> dict[str, tuple[int, int, torch.dtype]]:
    """Rows, width and type of each buffer."""
    layers, latent, routing = model.layers, model.struct.latent, model.struct.routing
    heads, dtype = model.query_heads, model.dtype
    hidden = -(-model.hidden_size // BLOCK) * BLOCK
    shapes = {
        "hidden": (tokens, hidden, torch.float32),
        "normed": (tokens, hidden, dtype),
        "qkv": (tokens, layers[0].qkv.columns, torch.float32),
        "attended": (tokens, heads * model.head_size, dtype),
        "activated": (tokens, max(layer.gate_up.columns for layer in layers) // 2, dtype),
        "logits": (logits, model.struct.head.columns, torch.float32),
    }
    if latent.latent:
        shapes |= {
            "qkv": (tokens, layers[0].latent.down.columns, torch.float32),
            "attended": (tokens, heads * latent.value, dtype),
            "query_latents": (tokens, -(-latent.query_latent // LANES) * LANES, dtype),
            "queries": (tokens, layers[0].latent.queries.columns, dtype),
            "absorbed": (tokens, heads * latent.row, dtype),
            "mixed": (tokens, heads * latent.latent, dtype),
        }
    if routing.num_experts:
        chosen, rows = routing.num_chosen, tokens * routing.num_chosen
        inner = max(layer.experts.gate_up.columns for layer in layers) // 2
        shapes |= {
            "shares": (tokens, chosen, torch.float32),
            "chosen": (tokens, chosen, torch.int32),
            "place": (tokens, chosen, torch.int32),
            "first_row": (1, routing.num_experts + 1, torch.int32),
            "expert_rows": (rows, hidden, dtype),
            "expert_activated": (rows, inner, dtype),
            "expert_out": (rows, hidden, torch.float32),
        }
    if model.is_int8:
        inputs = [shapes[name] for name in INPUTS if name in shapes]
        shapes |= {
            "integers": (1, max(rows * width for rows, width, _ in inputs), torch.uint8),
            "row_scales": (1, max(rows for rows, _, _ in inputs), torch.float32),
        }
    return shapes
