"""Spread one policy over the ranks of a world with torch's own FSDP2.

Full fine-tuning: every parameter becomes a float32 shard per rank; a layer is gathered in the compute dtype when it
runs, and gradients are reduce-scattered as float32 SUMS. LoRA: the frozen weights are sharded in the dtype they
have; adapters (and 4-bit weights, which cannot be cut) stay whole on every rank, and the Learner sums the adapters'
gradients once per step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kitae.config import SeamSettings
from kitae.parallel.world import World

log = logging.getLogger(__name__)


class Policy(Protocol):
    """What sharding asks of models.policy.Policy, which lies in a sibling layer."""

    causal_lm: Any  # a transformers model, whose attributes are dynamic
    peft: Any
    dtype: torch.dtype
    float32_names: set[str]
    seams: SeamSettings

    @property
    def layers(self) -> nn.ModuleList: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]: ...


def shard(policy: Policy, world: World) -> None:
    """Keep 1 / world_size of the policy on each rank, in place; a World of one is left as it is.

    So is a model that runs row by row (attention seam off): ranks with different rows would gather its layers
    different numbers of times.
    """
    if world.world_size == 1:
        return
    if not policy.seams.attention:
        log.warning("every rank holds the whole model: it runs row by row, because its attention seam is off")
        return
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    if policy.peft is None:
        for parameter in policy.parameters():
            parameter.data = parameter.data.float()
        whole: set[nn.Parameter] = set()
        # Inputs are not cast: the policy's own float32 numbers (loss coefficients) must arrive as they are.
        precision = MixedPrecisionPolicy(
            param_dtype=policy.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    else:
        whole = {p for p in policy.parameters() if p.requires_grad or not p.is_floating_point()}
        precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if policy.peft is None and policy.dtype != torch.float32:
        # What computes in float32 whatever the rest does, such as DeepSeek-V3's router, is a group of its own.
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for name in sorted({name.rpartition(".")[0] for name in policy.float32_names}):
            fully_shard(policy.causal_lm.get_submodule(name), mesh=mesh, mp_policy=exact)
    for module in [*policy.layers, cast(nn.Module, policy)]:
        fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=whole)
    # In the backward a module prefetches what ran before it. Before the first layer that is something of an earlier pass,
    # and after sampling, where a rank may have no prompts, not the same on all ranks. It prefetches itself, so nothing.
    for module in filter(_is_sharded, policy.layers[0].modules()):
        module.set_modules_to_backward_prefetch([module])
    for module in _sharded_modules(policy):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


@contextmanager
def unsharded(policy: Policy) -> Iterator[None]:
    """All parameters gathered meanwhile, so that ranks can run different numbers of forward passes (rollouts)."""
    modules = _sharded_modules(policy)
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        # The root comes first; FSDP never reshards it after its forward.
        for number, module in enumerate(modules):
            module.set_reshard_after_forward(number > 0, recurse=False)
        drop_gathered(policy)


def drop_gathered(policy: Policy) -> None:
    """Forget gathered parameters after the shards have changed: FSDP keeps the root's after a pass without backward."""
    for module in _sharded_modules(policy):
        module.reshard()


def full_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Each trainable parameter whole, one at a time; every rank must go through them. Shards come in compute dtype."""
    drop_gathered(policy)
    for name, parameter in policy.named_trainable():
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):
            dtype = torch.float32 if name in policy.float32_names else policy.dtype
            tensor = tensor.full_tensor().to(dtype)
        yield name, tensor


def _sharded_modules(policy: Policy) -> list[FSDPModule]:
    return list(filter(_is_sharded, policy.modules()))


def _is_sharded(module: nn.Module) -> TypeGuard[FSDPModule]:
    return isinstance(module, FSDPModule)
