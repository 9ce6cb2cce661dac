"""What a backward needs of the forward pass: kept, recomputed layer by layer, or recomputed from the host's memory.

    estimate, free memory --choose--> keep | recompute | offload --apply--> the model's layers

Recomputing keeps one tensor per layer, its input (arXiv:1604.06174); offloading moves that tensor to the host's memory until
the backward comes to its layer. In this order they take less memory and more time, so the first that fits is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kitae.config import ModelSettings
from kitae.errors import ModelError
from kitae.models.activations import activation_bytes, layer_input_bytes

log = logging.getLogger(__name__)

Way = Literal["keep", "recompute", "offload"]
GIB = 2**30


def choose(
    model: ModelSettings,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    room: int | None,
) -> Way:
    """What model.gradient_checkpointing means for passes of `tokens` tokens, and a line in the log that says so.

    `room` is the device's memory left to activations, in bytes; None where the estimate does not know the architecture.
    """
    wanted = model.gradient_checkpointing
    if wanted == "auto" and room is None:
        log.info(
            "activations: recomputed, since nothing is known of what a %s model keeps", config.model_type
        )
        return "recompute"
    if wanted == "auto":
        return _first_that_fits(config, dtype=dtype, device=device, tokens=tokens, room=room or 0)
    if wanted == "offload" and device.type == "cpu":
        log.info(
            "activations: recomputed, not offloaded: a CPU's memory is the host's (gradient_checkpointing)"
        )
        return "recompute"
    if room is not None:
        _tell_price(config, dtype, recompute=bool(wanted))
    if wanted == "offload":
        return "offload"
    return "recompute" if wanted else "keep"


def apply(causal_lm: Any, way: Way) -> None:
    """Let the layers of a transformers model (Any: its attributes are dynamic) do so."""
    if way == "keep":
        return
    if not causal_lm.supports_gradient_checkpointing:
        raise ModelError(
            f"model.gradient_checkpointing is on, but {causal_lm.config.model_type} models cannot; set it to false"
        )
    causal_lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # Only the reentrant kind needs embeddings with a gradient; a frozen layer below the first adapter needs none.
    causal_lm.disable_input_require_grads()
    if way == "offload":
        for module in causal_lm.modules():
            if (checkpoint := getattr(module, "_gradient_checkpointing_func", None)) is not None:
                module._gradient_checkpointing_func = partial(_from_host, checkpoint)


def _from_host(checkpoint: Callable[..., Any], layer: Callable[..., Any], *inputs: Any) -> Any:
    """torch's checkpoint of a layer (Any: it returns what the layer does), its inputs kept in the host's memory.

    What the layer itself would keep is thrown away by the checkpoint, whose own hooks are the inner ones.
    """
    with saved_tensors_hooks(_to_host, _to_device):
        return checkpoint(layer, *inputs)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    is_pinned = tensor.device.type != "cpu"  # so that the copy does not hold up the device's stream
    host = torch.empty_like(tensor, device="cpu", pin_memory=is_pinned)
    return tensor.device, host.copy_(tensor, non_blocking=is_pinned)


def _to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, host = packed
    return host.to(device, non_blocking=True)


def _first_that_fits(config: Any, *, dtype: torch.dtype, device: torch.device, tokens: int, room: int) -> Way:
    kept, recomputed = (
        activation_bytes(config, num_tokens=tokens, element=dtype.itemsize, recompute=choice)
        for choice in (False, True)
    )
    host = layer_input_bytes(config, num_tokens=tokens, element=dtype.itemsize)
    prices: dict[Way, int] = {"keep": kept, "recompute": recomputed}
    if device.type != "cpu":
        prices["offload"] = recomputed - host + host // config.get_text_config().num_hidden_layers
    way = next((way for way, price in prices.items() if price <= room), list(prices)[-1])
    offloaded = ""
    if "offload" in prices:
        offloaded = f", or {prices['offload'] / GIB:.2f} and {host / GIB:.2f} of the host's, copied twice"
    log.info(
        "activations: %s (model.gradient_checkpointing auto): a pass of up to %s tokens keeps about %.2f GiB, %.2f "
        "recomputed in about a third more time%s; %.2f GiB are free for it",
        {"keep": "kept", "recompute": "recomputed", "offload": "recomputed and offloaded"}[way],
        f"{tokens:,}",
        kept / GIB,
        recomputed / GIB,
        offloaded,
        max(room, 0) / GIB,
    )
    return way


def _tell_price(config: Any, dtype: torch.dtype, *, recompute: bool) -> None:
    """Log what a pass keeps for its backward, and what it would with the other choice."""
    mib = [
        activation_bytes(config, num_tokens=1024, element=dtype.itemsize, recompute=choice) / 2**20
        for choice in (recompute, not recompute)
    ]
    log.info(
        "activations: about %.1f MiB per 1,024 tokens of a forward pass (%.1f with model.gradient_checkpointing %s, "
        "in about a third %s time)",
        *mib,
        str(not recompute).lower(),
        "less" if recompute else "more",
    )
