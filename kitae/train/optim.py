"""Optimizers over shaped float32 views, the learning-rate schedule, and the loss scale of float16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kitae.config import OptimSettings
from kitae.errors import MissingExtraError
from kitae.parallel.world import World
from kitae.train import adamw
from kitae.train.adafactor import Adafactor
from kitae.train.flat import FlatParameters


def learning_rate(settings: OptimSettings, *, step: int, total_steps: int) -> float:
    """The learning rate of the 1-based `step`: linear warm-up, then the schedule down to its floor.

    The last warm-up step and the first one after it have the full rate; no step has rate 0 by warm-up. After
    warm-up it equals transformers' schedules. Example: 2 of 6 steps warm-up, linear, from 1: 0.5 1 1 0.75 0.5 0.25.
    """
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total_steps)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    progress = min((step - 1 - warmup) / max(total_steps - warmup, 1), 1.0)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[settings.lr_scheduler]
    return settings.learning_rate * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * shape)


def make_optimizer(
    settings: OptimSettings, parameters: Sequence[nn.Parameter], *, world: World
) -> torch.optim.Optimizer:
    """The optimizer named in the settings; weight decay falls on matrices only.

    `world` is the ranks the parameters are sharded over by rows: World() for whole parameters.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate, betas = settings.learning_rate, (settings.beta1, settings.beta2)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=settings.epsilon, fused=True)
    if settings.name == "adafactor":
        return Adafactor(groups, lr=rate, world=world)
    made: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(
        groups, lr=rate, betas=betas, eps=settings.epsilon
    )
    return made


@torch.no_grad()
def update(
    optimizer: torch.optim.Optimizer, flat: FlatParameters, *, learning_rate: float, scale: float
) -> None:
    """Change masters and weights by the gradient times `scale`, and clear the gradient."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if flat.has_kernels and adamw.fits(optimizer, flat.slots):
        adamw.update(optimizer, flat.slots, scale=scale)
        return
    if scale != 1.0:
        flat.grad.mul_(scale)
    optimizer.step()
    flat.publish()
    flat.zero_grad()


class LossScale:
    """Factor on a float16 loss that keeps small gradients from vanishing: halved by an overflow, doubled in peace."""

    def __init__(self, *, start: float = 2.0**16, steps_to_double: int = 2000) -> None:
        self.value = start
        self.steps_to_double = steps_to_double
        self.good_steps = 0

    def went_well(self) -> None:
        self.good_steps += 1
        if self.good_steps == self.steps_to_double:
            self.value, self.good_steps = self.value * 2.0, 0

    def overflowed(self) -> bool:
        """Halve; false where the scale was 1 already, so that the gradient itself must be bad."""
        self.good_steps = 0
        if self.value <= 1.0:
            return False
        self.value /= 2.0
        return True

    def state(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state(self, state: dict[str, float]) -> None:
        self.value, self.good_steps = state["value"], int(state["good_steps"])


def _bitsandbytes() -> Any:  # the package has no types
    try:
        import bitsandbytes
    except ImportError:
        raise MissingExtraError(
            "optim.name is adamw_8bit, which needs bitsandbytes: pip install 'kitae[qlora]', or use adamw"
        ) from None
    return bitsandbytes
