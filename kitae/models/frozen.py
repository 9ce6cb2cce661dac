"""A frozen copy of what trains: the adapter a LoRA run's reference uses, and moving weights into a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from kitae.config import ModelSettings
from kitae.models.load import load_policy
from kitae.models.lora import ADAPTER, REFERENCE, adapter_parameters, finish, without_peft_chatter
from kitae.models.policy import Policy

Pair = tuple[str, Tensor, Tensor]
"""A parameter's name, the frozen copy, and the one that trains."""


def load_keeping_start(model: ModelSettings, **how: Any) -> Policy:
    """load_policy, with a frozen copy of a LoRA policy's start adapter inside, which its reference() then uses.

    While the copy equals a fresh adapter, whose B is 0, the reference is the model without its adapter.
    """
    # **how: the keyword arguments of load_policy.
    policy = load_policy(model, **how)
    if policy.peft is None or policy.reference_adapter is not None:
        return policy
    wrapper: Any = policy.peft
    config = copy.deepcopy(wrapper.peft_config[ADAPTER])
    with without_peft_chatter():
        wrapper.add_adapter(REFERENCE, config, autocast_adapter_dtype=False)
        wrapper.set_adapter(ADAPTER)
    finish(policy.causal_lm, policy.dtype)
    policy.reference_adapter = REFERENCE
    for _, frozen, trained in adapter_pairs(policy):
        frozen.requires_grad_(False)
        copy_into(frozen, trained)
    return policy


def adapter_pairs(policy: Policy) -> list[Pair]:
    """The adapter that trains, matched with its frozen copy."""
    parameters = dict(policy.causal_lm.named_parameters())
    return [
        (name, parameters[name.replace(f".{ADAPTER}.", f".{REFERENCE}.")], trained)
        for name, trained in adapter_parameters(policy.causal_lm)
    ]


def model_pairs(frozen: Policy, policy: Policy) -> list[Pair]:
    """A policy's weights, matched with those of a second copy of the model."""
    trained = dict(policy.causal_lm.named_parameters())
    return [(name, parameter, trained[name]) for name, parameter in frozen.causal_lm.named_parameters()]


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy values; either may be a shard of this rank, and a whole one is cut as the other is."""
    if isinstance(target, DTensor):
        if not isinstance(source, DTensor):
            source = distribute_tensor(source.detach(), target.device_mesh, target.placements)
        target.to_local().copy_(source.to_local())
    else:
        target.copy_(source)


class RenewedWeights:
    """The reference's weights in a run that renews them; part of every checkpoint."""

    def __init__(self, pairs: Callable[[], list[Pair]]) -> None:
        """`pairs` is called anew each time: while FSDP has a layer gathered, its parameters are other objects."""
        self._pairs = pairs

    def renew(self) -> None:
        """Let the reference be what the policy is now."""
        for _, frozen, trained in self._pairs():
            copy_into(frozen, trained)

    def state(self) -> dict[str, Any]:
        return {name: _own(frozen) for name, frozen, _ in self._pairs()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        for name, frozen, _ in self._pairs():
            _own(frozen).copy_(state[name])


def _own(tensor: Tensor) -> Tensor:
    """This rank's part."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
