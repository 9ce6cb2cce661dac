"""torch's AdamW with everything else that an update does, in one pass over memory: scaling, publishing, clearing.

    gradient, moments, master --kernels/adamw.h--> moments, master, weight in the model's precision; gradient 0

The state is torch's own, so checkpoints do not depend on which of the two computed a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from kitae.models import native

if TYPE_CHECKING:
    from kitae.train.flat import Slot


def fits(optimizer: torch.optim.Optimizer, slots: Iterable[Slot]) -> bool:
    """Whether the kernel takes these: whole parameters on a CPU without gaps, in float32 or bfloat16, under plain AdamW."""
    return type(optimizer) is torch.optim.AdamW and all(
        native.fits(slot.parameter) and native.fits(slot.master) and slot.parameter.is_contiguous()
        for slot in slots
    )


@torch.no_grad()
def update(optimizer: torch.optim.Optimizer, slots: Iterable[Slot], *, scale: float) -> None:
    """One step with the gradients times `scale`, after which they are zero and the weights published."""
    by_master = {slot.master: slot for slot in slots}
    for group in optimizer.param_groups:
        for master in group["params"]:
            state = optimizer.state[master]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            state["step"] += 1
            step, (beta1, beta2), rate = float(state["step"]), group["betas"], group["lr"]
            parameter = by_master[master].parameter
            native.adamw_(
                master,
                by_master[master].grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                None if parameter.dtype == torch.float32 else parameter,
                scale=scale,
                decay=1.0 - rate * group["weight_decay"],
                betas=(beta1, beta2),
                step_size=rate / (1.0 - beta1**step),
                root_correction=math.sqrt(1.0 - beta2**step),
                epsilon=group["eps"],
            )
