"""A policy's weights with its active adapters added, in float32: what a sampler that knows no adapters computes with.

Dimension key: N outputs, K inputs of a linear layer; E experts, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def merged_weight(linear: Any) -> Tensor:
    """A linear layer's weight [N, K]."""
    if type(linear) is nn.Linear:
        return linear.weight.detach()
    weight_NK: Tensor = linear.base_layer.weight.detach()
    for name in _active(linear):
        a, b = linear.lora_A[name].weight.detach().float(), linear.lora_B[name].weight.detach().float()
        weight_NK = torch.addmm(weight_NK.float(), b, a, alpha=linear.scaling[name])
    return weight_NK


def bias_of(linear: Any) -> Tensor | None:
    """A linear layer's bias [N]; adapters have none."""
    bias = linear.bias if type(linear) is nn.Linear else linear.base_layer.bias
    return None if bias is None else bias.detach()


def merged_experts(experts: Any, parameter: str) -> Iterator[Tensor]:
    """Each expert's weight [N, K], one after the other, of a module as models/experts.py computes it."""
    adapters = []
    module = experts
    while hasattr(module, "parameter_name"):  # peft nests a wrapper for each adapted parameter
        if module.parameter_name == parameter:
            for name in _active(module):
                a, b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
                # peft lays A out as (E R, K) and B as (N, R E) with the expert fastest.
                a_ERK = a.view(module.num_experts, -1, a.shape[1])
                b_ENR = b.view(b.shape[0], -1, module.num_experts).permute(2, 0, 1)
                adapters.append((a_ERK, b_ENR, module.scaling[name]))
        module = module.base_layer
    for e, weight_NK in enumerate(getattr(module, parameter).detach()):
        for a_ERK, b_ENR, scale in adapters:
            weight_NK = torch.addmm(weight_NK.float(), b_ENR[e].float(), a_ERK[e].float(), alpha=scale)
        yield weight_NK


def inner_experts(experts: Any) -> Any:
    """The module that holds the experts' weights, inside peft's wrappers."""
    while hasattr(experts, "parameter_name"):
        experts = experts.base_layer
    return experts


def why_not_linear(linear: Any) -> str | None:
    """Why a linear layer's weight cannot be had by merged_weight, or None where it can."""
    if type(linear) is nn.Linear:
        return None
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.lora.layer import ParamWrapper

    base = getattr(linear, "base_layer", linear)
    if type(linear) not in (LoraLinear, ParamWrapper) or type(base) is not nn.Linear:
        return f"its weights are packed from plain linear layers, and this one has {type(base).__name__}"
    return _why_not_adapter(linear)


def why_not_experts(experts: Any) -> str | None:
    """Why experts' weights cannot be had by merged_experts, or None where they can."""
    module = experts
    while hasattr(module, "parameter_name"):
        if reason := _why_not_adapter(module):
            return reason
        module = module.base_layer
    if not all(
        isinstance(getattr(module, name, None), nn.Parameter) for name in ("gate_up_proj", "down_proj")
    ):
        return f"its experts are of another kind ({type(module).__name__})"
    if not module.gate_up_proj.is_floating_point():
        return "its experts are not stored as floating-point numbers"
    return None


def _why_not_adapter(layer: Any) -> str | None:
    if layer.lora_variant or any(layer.lora_bias.values()) or layer.merged:
        return "its adapter is more than two matrices"
    return None


def _active(layer: Any) -> list[str]:
    """The adapters a peft layer applies now."""
    return [] if layer.disable_adapters else [n for n in layer.active_adapters if n in layer.lora_A]
