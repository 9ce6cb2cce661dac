"""Float32 masters and gradients of the trainable parameters: flat storage, shaped views.

    bf16 backward --add, free--> gradient view (float32) --optimizer--> master view (float32) --publish--> bf16 weight

A float32 parameter of a whole model *is* a view of the flat master, and its .grad a view of the flat gradient. A
sharded parameter (FSDP2, float32) keeps its own shard as master, and its gradient shard is a view of the flat one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kitae.models import native
from kitae.parallel.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One trainable parameter, and what the optimizer sees of it on this rank."""

    name: str
    parameter: nn.Parameter
    master: nn.Parameter
    """Float32 and of the parameter's shape (of its local shard's, if sharded); its .grad is the float32 gradient."""

    @property
    def grad(self) -> Tensor:
        assert self.master.grad is not None
        return self.master.grad


class FlatParameters:
    """The trainable parameters of a policy; `grad` is the one flat buffer behind all their gradients.

    With `kernels`, those of models/native.py add low-precision gradients up.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], *, kernels: bool = False) -> None:
        assert named, "a policy without trainable parameters"
        self.has_kernels = kernels
        locals_ = [_local(parameter) for _, parameter in named]
        self.is_sharded = any(isinstance(parameter, DTensor) for _, parameter in named)
        sizes = [local.numel() for local in locals_]
        device = locals_[0].device
        self.grad = torch.zeros(sum(sizes), device=device)
        whole = [
            0 if isinstance(parameter, DTensor) else size
            for (_, parameter), size in zip(named, sizes, strict=True)
        ]
        masters = torch.empty(sum(whole), device=device)
        self.slots = [
            _make_slot(name, parameter, master=master, grad=grad.view(local.shape), kernels=kernels)
            for (name, parameter), local, master, grad in zip(
                named, locals_, torch.split(masters, whole), torch.split(self.grad, sizes), strict=True
            )
        ]

    def zero_grad(self) -> None:
        """Clear every gradient, also one that an interrupted backward left on a parameter."""
        self.grad.zero_()
        for slot in self.slots:
            if not _shares_gradient(slot.parameter):
                slot.parameter.grad = None

    def grad_norm(self, world: World) -> float:
        """Norm of the whole model's gradient, the same on every rank."""
        squares = torch.stack([slot.grad.norm() for slot in self.slots]).double().square().sum()
        if self.is_sharded:
            squares = world.sum(squares)
        return float(squares.sqrt())

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the weights that are not their own masters."""
        for slot in self.slots:
            if not _shares_gradient(slot.parameter):
                slot.parameter.copy_(slot.master)


def _make_slot(name: str, parameter: nn.Parameter, *, master: Tensor, grad: Tensor, kernels: bool) -> Slot:
    if isinstance(parameter, DTensor):
        # FSDP adds to an existing gradient shard in place, so it never replaces this view.
        parameter.grad = DTensor.from_local(
            grad,
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        master = _local(parameter)
    else:
        master = master.view(parameter.shape)
        master.copy_(parameter.detach())
        parameter.main_grad = grad  # type: ignore[attr-defined]  # where models/heads.py adds the head's gradient
        if _shares_gradient(parameter):
            parameter.data = master
            parameter.grad = grad
        else:
            parameter.register_post_accumulate_grad_hook(partial(_move_gradient, kernels=kernels))
    seen = nn.Parameter(master)
    seen.grad = grad
    return Slot(name=name, parameter=parameter, master=seen)


def _move_gradient(parameter: Tensor, *, kernels: bool) -> None:
    """Add a backward's low-precision gradient to the float32 one, and free it."""
    if parameter.grad is None:  # the head's and the experts' backward added it to main_grad already
        return
    if kernels and native.fits(parameter.grad):
        native.add_(parameter.main_grad, parameter.grad)  # type: ignore[attr-defined]
    else:
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None


def _local(parameter: nn.Parameter) -> Tensor:
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _shares_gradient(parameter: nn.Parameter) -> bool:
    return parameter.dtype == torch.float32
