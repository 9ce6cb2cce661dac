"""Kinds of hardware behind one small protocol; the files of this folder are the only ones that name any."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from kitae.errors import ConfigError, PlanError
from kitae.plugins import did_you_mean, names_in

Feature = Literal["bfloat16", "float16", "nf4", "flex_attention", "float8", "triton", "recording"]


class Recording(NamedTuple):
    """Work on a device that was launched once and can be launched again at once, with what lies in the same tensors."""

    replay: Callable[[], None]
    result: Tensor
    """Where every replay leaves its result."""
    pool: Any
    """The memory it works in, which other recordings of the same work may share."""


class Backend(Protocol):
    """What the rest of kitae asks of a kind of device; each module of this package has one, named BACKEND."""

    name: str
    """torch's device type."""
    process_group: str
    """Name of the torch.distributed backend between such devices."""
    preference: int
    """`auto` takes the available backend with the highest."""
    tokens_per_forward: int | None
    """More tokens in one forward pass cost memory and win no speed; None: as many as fit."""

    def is_available(self) -> bool: ...

    def count(self) -> int:
        """How many such devices this machine has."""

    def prepare(self) -> None:
        """Called before a model is loaded onto such a device; for another than a CPU before it is touched at all."""

    def supports(self, feature: Feature) -> tuple[bool, str]:
        """Whether the hardware is good at it, and the reason to show."""

    def device(self, local_rank: int) -> torch.device:
        """The device of the process with this number on its machine."""

    def memory(self, device: torch.device) -> tuple[int, int]:
        """Bytes free now, and bytes in all."""

    def peak_memory(self, device: torch.device) -> int:
        """The most bytes this process has held so far."""

    def synchronize(self, device: torch.device) -> None: ...

    def seed(self, seed: int) -> None: ...

    def rng_state(self, device: torch.device) -> Tensor: ...

    def set_rng_state(self, state: Tensor, device: torch.device) -> None: ...

    def record(self, work: Callable[[], Tensor], *, pool: Any = None) -> Recording:
        """Record work that never waits for the device; RuntimeError where it cannot be. See supports("recording")."""


def pick(name: str = "auto", *, setting: str = "model.device") -> Backend:
    """The backend of a device name such as cuda or cuda:1, or for auto the best one that is available.

    `setting` is what an error says the name was given as.
    """
    known = names_in(__name__)
    kind = name.partition(":")[0]
    if kind == "auto":
        return max((b for b in map(_load, known) if b.is_available()), key=lambda b: b.preference)
    if kind not in known:
        raise ConfigError(f"{setting} {name!r} is unknown; {did_you_mean(kind, ['auto', *known])}")
    backend = _load(kind)
    if not backend.is_available():
        raise ConfigError(f"{setting} is {name!r}, but this machine has no {kind} device; use auto or cpu")
    return backend


def pick_device(name: str = "auto", *, local_rank: int = 0, setting: str = "model.device") -> torch.device:
    """The torch device a setting such as auto, cpu, cuda or cuda:1 means for this process."""
    backend = pick(name, setting=setting)
    return torch.device(name) if ":" in name else backend.device(local_rank)


def of(device: torch.device) -> Backend:
    """The backend of a device in use."""
    return _load(device.type)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on an accelerator or in the CPU's allocators."""
    told = ("DefaultCPUAllocator", "std::bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(name in str(error) for name in told)


def first_line(error: BaseException) -> str:
    """What an error says in one line: torch's go on for many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def enough_memory(what: str, *, remedy: str) -> Iterator[None]:
    """Where an allocation fails inside, a PlanError: `what` ran out of memory, and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise PlanError(f"{what} ran out of memory ({first_line(error)}); {remedy}") from error


def _load(name: str) -> Backend:
    backend: Backend = importlib.import_module(f"{__name__}.{name}").BACKEND
    return backend
