"""The processes of one run, and the few things they say to each other: sums of tensors, and JSON values.

A World of one needs no torch.distributed. Several ranks come from `kitae launch` or torchrun, which set RANK,
WORLD_SIZE and LOCAL_RANK. Values travel as tensors and JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kitae import backends
from kitae.errors import ConfigError
from kitae.parallel.launch import STORE_VARIABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Who this process is among the processes of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number of this rank on its machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this rank's tensors live; collectives of JSON values pass through it."""

    @property
    def is_main(self) -> bool:
        """Rank 0 logs, writes files and draws the progress bar."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` over all ranks, in place; every rank gets the same bits."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        payload = _to_bytes(value, self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(payload)], device=self.device))
        longest = int(max(size.item() for size in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(payload)] = payload
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        return [_from_bytes(part[: int(size)]) for part, size in zip(received, sizes, strict=True)]

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank; what other ranks pass is ignored."""
        if self.world_size == 1:
            return value
        payload = _to_bytes(value if self.is_main else None, self.device)
        size = torch.tensor([len(payload)], device=self.device)
        dist.broadcast(size, src=0)
        if not self.is_main:
            payload = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(payload, src=0)
        return _from_bytes(payload)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group; nothing can be said after that."""
        if self.world_size > 1:
            dist.destroy_process_group()


def start_world(*, device: str = "auto", timeout_s: float = 1800) -> World:
    """Join the other ranks if the environment names any, else return a World of one.

    `device` is model.device: auto, cpu, cuda, ...; each rank of a machine takes the accelerator of its local rank. A
    rank that does not answer for timeout_s ends the run.
    """
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    local_rank = _number("LOCAL_RANK", rank)
    own_device = backends.pick_device(device, local_rank=local_rank)
    if own_device.type != "cpu":
        backends.of(own_device).prepare()  # its allocator reads its settings when the device is first touched
        torch.accelerator.set_device_index(own_device)
    if world_size > 1:
        if _number("LOCAL_WORLD_SIZE", world_size) == world_size:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
        store = os.environ.get(STORE_VARIABLE)
        dist.init_process_group(
            backends.of(own_device).process_group,
            init_method=f"file://{store}" if store else "env://",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    return World(rank=rank, world_size=world_size, local_rank=local_rank, device=own_device)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdigit():
        raise ConfigError(
            f"environment variable {variable} is {text!r}, not a number; it is set by the launcher: "
            "start with `kitae launch` or torchrun, or unset it"
        )
    return int(text)


def _loopback_interface() -> str:
    """The name of 127.0.0.1's interface: lo on Linux, lo0 on macOS."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _to_bytes(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _from_bytes(payload: Tensor) -> Any:
    return json.loads(payload.cpu().numpy().tobytes())
