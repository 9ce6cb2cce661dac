"""Where a frozen model's layers lie when one device cannot hold them: in order over all devices of the machine.

What is not a layer (embedding, final norm, head) lies on the first device, where tokens are read and drawn; keys and values
lie with their layer. A row passes the devices one after another, so that this holds larger models and is not faster.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kitae import backends
from kitae.errors import PlanError
from kitae.models import estimate

log = logging.getLogger(__name__)
STEPS = 40
"""Halvings in the search for the smallest share of memory that suffices."""


def spread(
    meta_model: Any, plan: estimate.Plan, *, device: torch.device, name: str
) -> dict[str, torch.device] | None:
    """Module names -> devices, as from_pretrained reads them; None where `device` holds the model or is the only one."""
    backend = backends.of(device)
    devices = [backend.device(number) for number in range(backend.count())]
    room = [free - int(estimate.RESERVE * total) for free, total in map(backend.memory, devices)]
    size = estimate.estimate(meta_model, plan).weight_bytes
    if len(devices) == 1 or size <= room[devices.index(device)]:
        return None
    layers = _layers_name(meta_model)
    blocks: nn.ModuleList = meta_model.get_submodule(layers)
    parameters = sum(p.numel() for p in meta_model.parameters())
    sizes = [size * sum(p.numel() for p in block.parameters()) // parameters for block in blocks]
    counts = balance(sizes, outside=size - sum(sizes), room=room)
    if counts is None:
        raise PlanError(
            f"{name} needs {size / estimate.GIB:.1f} GiB before activations, which does not fit layer by layer into the "
            f"{sum(room) / estimate.GIB:.1f} GiB that are free on {len(devices)} devices; set model.quantization = nf4, or "
            "take a smaller model"
        )
    places = dict.fromkeys(_outside(meta_model, layers), devices[0])
    numbers = iter(range(len(blocks)))
    for place, count in zip(devices, counts, strict=True):
        places |= {f"{layers}.{next(numbers)}": place for _ in range(count)}
    log.info("layers on %s", ", ".join(f"{d}: {n}" for d, n in zip(devices, counts, strict=True)))
    return places


def balance(sizes: Sequence[int], *, outside: int, room: Sequence[int]) -> list[int] | None:
    """How many of the layers, in order, each device gets, so that the fullest one is as empty as can be.

    `outside` bytes lie on the first device besides. None where they do not fit. Example: four layers of 10 bytes, 10
    outside, two devices of 40 bytes -> [2, 2].
    """
    fitting = _fill(sizes, outside, room)
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        share = (low + high) / 2
        found = _fill(sizes, outside, [int(share * size) for size in room])
        low, high = (low, share) if found else (share, high)
        fitting = found or fitting
    return fitting


def _fill(sizes: Sequence[int], outside: int, room: Sequence[int]) -> list[int] | None:
    counts, device, used = [0] * len(room), 0, outside
    if outside > room[0]:
        return None
    for size in sizes:
        while used + size > room[device]:
            device, used = device + 1, 0
            if device == len(room):
                return None
        counts[device] += 1
        used += size
    return counts


def _layers_name(meta_model: Any) -> str:
    decoder: nn.Module = meta_model.get_decoder()
    blocks = next(m for m in decoder.modules() if isinstance(m, nn.ModuleList))
    name: str = next(name for name, module in meta_model.named_modules() if module is blocks)
    return name


def _outside(meta_model: Any, layers: str) -> list[str]:
    """Names of the modules beside the layers that have weights or buffers of their own."""
    return [
        name
        for name, module in meta_model.named_modules()
        if not f"{name}.".startswith(f"{layers}.")
        and (
            next(module.parameters(recurse=False), None) is not None
            or next(module.buffers(recurse=False), None) is not None
        )
    ]
