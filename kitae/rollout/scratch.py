"""Room for what the kernels compute on the way from tokens to logits (Scratch of kernels/model.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from kitae.rollout import structs
from kitae.rollout.packed import PackedModel
from kitae.rollout.shapes import BLOCK, LANES
from kitae.rollout.structs import pointer


def make_scratch(
    model: PackedModel, *, tokens: int, logits: int
) -> tuple[structs.Scratch, Tensor, list[Tensor]]:
    """Room for a pass of so many tokens and for so many rows of logits.

    Returned are the struct, the logits [rows, vocabulary], and all tensors, which must live as long as the struct.
    """
    widths = _widths(model)
    in_float32 = ("hidden", "qkv", "logits", "expert_out", "shares")
    rows = dict.fromkeys(widths, tokens) | {"logits": logits}
    routing = model.struct.routing
    if routing.num_experts:
        rows |= {name: tokens * routing.num_chosen for name in widths if name.startswith("expert_")}
    buffers = {
        name: torch.empty(rows[name], width, dtype=torch.float32 if name in in_float32 else model.dtype)
        for name, width in widths.items()
    }
    numbers = {}
    if routing.num_experts:
        buffers["shares"] = torch.empty(tokens, routing.num_chosen)
        numbers = {
            "chosen": torch.empty(tokens, routing.num_chosen, dtype=torch.int32),
            "place": torch.empty(tokens, routing.num_chosen, dtype=torch.int32),
            "first_row": torch.empty(routing.num_experts + 1, dtype=torch.int32),
        }
    strides = {f"{name}_stride": width for name, width in widths.items()}
    known = {name for name, _ in structs.Scratch._fields_}
    struct = structs.Scratch(
        **{name: pointer(buffer) for name, buffer in (buffers | numbers).items()},
        **{name: width for name, width in strides.items() if name in known},
    )
    return struct, buffers["logits"][:, : model.vocabulary], [*buffers.values(), *numbers.values()]


def _widths(model: PackedModel) -> dict[str, int]:
    """Numbers in a row of each buffer."""
    layers, latent, heads = model.layers, model.struct.latent, model.query_heads
    hidden = -(-model.hidden_size // BLOCK) * BLOCK
    widths = {
        "hidden": hidden,
        "normed": hidden,
        "qkv": layers[0].qkv.columns,
        "attended": heads * model.head_size,
        "activated": max(layer.gate_up.columns for layer in layers) // 2,
        "logits": model.struct.head.columns,
    }
    if latent.latent:
        widths |= {
            "qkv": layers[0].latent.down.columns,
            "attended": heads * latent.value,
            "query_latents": -(-latent.query_latent // LANES) * LANES,
            "queries": layers[0].latent.queries.columns,
            "absorbed": heads * (latent.latent + latent.rotated),
            "mixed": heads * latent.latent,
        }
    if model.struct.routing.num_experts:
        inner = max(layer.experts.gate_up.columns for layer in layers) // 2
        widths |= {"expert_rows": hidden, "expert_activated": inner, "expert_out": hidden}
    return widths
