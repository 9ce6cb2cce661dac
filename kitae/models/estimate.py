"""Will it fit? Bytes a model needs, from its configuration alone, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from kitae.errors import PlanError
from kitae.models.lora import Targets, find_targets, unquantized

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 1 / 256
"""Bytes per weight in NF4: 4 bits, a scale of 8 bits per 64 weights, and the scale's own scales."""
MASTER_BYTES = 8
"""Per trained weight beyond the computed copy: float32 master and gradient."""
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0}
"""Per trained weight, by optim.name; adafactor's row and column means do not count."""
SUGGESTED_RANK = 16
RESERVE = 0.05
"""Share of the machine's memory left to activations, logits and everything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a model needs on the device of one rank, activations aside."""

    parameters: int
    trainable: int
    weight_bytes: int
    training_bytes: int
    """Masters, gradients and optimizer moments of what trains."""
    sampler_bytes: int
    """The native engine's own copy of the weights."""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.training_bytes + self.sampler_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model would be loaded."""

    dtype: torch.dtype
    lora_rank: int = 0
    target_modules: list[str] | str = "all-linear"
    nf4: bool = False
    trainable: bool = True
    optimizer: str = "adamw"
    ranks: int = 1
    """Ranks the model is sharded over; while it is loaded, each holds all of it."""
    packed_copy: bool = False
    """Whether the native engine samples from it, which packs the weights a second time; 4-bit ones it cannot read."""


def build_on_meta(config: Any, *, scores: bool = False) -> Any:
    """The model of a configuration with shapes and without memory; `scores`: with a score for a head."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    with torch.device("meta"):
        if scores:
            return AutoModelForSequenceClassification.from_config(config)
        return AutoModelForCausalLM.from_config(config)


def estimate(meta_model: Any, plan: Plan) -> Estimate:
    """Bytes of a model built on the meta device under a plan."""
    sizes = {name: p.numel() for name, p in meta_model.named_parameters()}
    total, element = sum(sizes.values()), plan.dtype.itemsize
    packed = 0
    if plan.nf4:
        kept = set(unquantized(meta_model))
        linears = find_targets(meta_model, "all-linear").linears
        packed = sum(sizes[f"{name}.weight"] for name in linears if name not in kept)
    weights = packed * NF4_BYTES + (total - packed) * element
    trained = total if plan.trainable and not plan.lora_rank else 0
    if plan.trainable and plan.lora_rank:
        targets = find_targets(meta_model, plan.target_modules)
        trained = adapter_size(meta_model, targets, plan.lora_rank)
        weights += trained * element
    # In float32, and in shards, the trained weights are the masters themselves.
    is_sharded = plan.ranks > 1 and trained == total
    if is_sharded:
        weights = total * 4
    is_master = is_sharded or plan.dtype == torch.float32
    training = trained * (MASTER_BYTES - 4 * is_master + MOMENT_BYTES[plan.optimizer])
    if is_sharded:
        training //= plan.ranks
    return Estimate(
        parameters=total,
        trainable=trained,
        weight_bytes=int(weights),
        training_bytes=training,
        sampler_bytes=_packed_bytes(meta_model, plan.dtype) if plan.packed_copy and not plan.nf4 else 0,
    )


def _packed_bytes(causal_lm: Any, dtype: torch.dtype) -> int:
    """The native engine's copy: all but an embedding that is not the head, which it reads in place; float16 in float32."""
    total: int = sum(p.numel() for p in causal_lm.parameters())
    embedding, head = causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight
    if dtype == torch.float16:
        return 4 * (total + int(embedding.numel()) if head is embedding else total)
    return dtype.itemsize * (total if head is embedding else total - int(embedding.numel()))


def adapter_size(causal_lm: Any, targets: Targets, rank: int) -> int:
    """Parameters of adapters of that rank: rank x (in + out) each, for every expert anew."""
    size = 0
    for name in targets.linears:
        linear: nn.Linear = causal_lm.get_submodule(name)
        size += rank * (linear.in_features + linear.out_features)
    for name in targets.fused:
        num_experts, out_size, in_size = causal_lm.get_parameter(name).shape
        size += num_experts * rank * (in_size + out_size)
    return size


def require_fit(meta_model: Any, plan: Plan, *, name: str, free: int, total: int) -> Estimate:
    """Refuse a model that cannot fit into `free` bytes, with the numbers and the cheapest change that would fit."""
    need = estimate(meta_model, plan)
    room = free - int(RESERVE * total)
    if need.total_bytes <= room:
        return need
    changes = [(text, estimate(meta_model, changed).total_bytes) for text, changed in _cheaper(plan)]
    fitting = next((f"{text} needs {_size(size)}" for text, size in changes if size <= room), None)
    advice = fitting or "take a smaller model or a machine with more memory"
    raise PlanError(
        f"{name} needs {_size(need.total_bytes)} before activations ({need.parameters:,} parameters: weights "
        f"{_size(need.weight_bytes)}, training {need.trainable:,} of them {_size(need.training_bytes)}"
        f"{f', the native engine {_size(need.sampler_bytes)}' if need.sampler_bytes else ''}), but "
        f"{_size(max(room, 0))} of {_size(total)} are free; {advice}"
    )


def _cheaper(plan: Plan) -> list[tuple[str, Plan]]:
    """Changes of the settings that take less memory, the least change first."""
    options: list[tuple[str, Plan]] = []
    if plan.packed_copy and not plan.nf4:
        plan = replace(plan, packed_copy=False)
        options.append(("rollout.engine = generic", plan))
    if plan.trainable and not plan.lora_rank:
        plan = replace(plan, lora_rank=SUGGESTED_RANK)
        text = " and ".join([*(t for t, _ in options[-1:]), f"lora.rank = {plan.lora_rank}"])
        options.append((text, plan))
    if plan.dtype == torch.float32:
        plan = replace(plan, dtype=torch.bfloat16)
        text = " and ".join([*(t for t, _ in options[-1:]), "model.dtype = bfloat16"])
        options.append((text, plan))
    if not plan.nf4 and (plan.lora_rank or not plan.trainable):
        text = " and ".join([*(t for t, _ in options[-1:]), "model.quantization = nf4"])
        options.append((text, replace(plan, nf4=True)))
    return options


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
