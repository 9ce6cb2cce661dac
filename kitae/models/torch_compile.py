"""torch.compile of a model's layers (model.torch_compile), and how long it has taken."""

from __future__ import annotations

import logging

import torch
from torch import nn

from kitae.compiler import BuildError, find_compiler
from kitae.errors import ConfigError

log = logging.getLogger(__name__)


def compile_layers(layers: nn.ModuleList, *, device: torch.device) -> None:
    """Let each layer be compiled when it first runs, in place; on a CPU that takes a C++ compiler."""
    if device.type == "cpu":
        try:
            find_compiler()
        except BuildError as error:
            raise ConfigError(
                f"model.torch_compile is true, but {error}; install g++, or set it to false"
            ) from error
    log.info(
        "torch.compile: layers are compiled in the first step, which may take a minute; see time/compile_s"
    )
    for layer in layers:
        layer.compile()


def seconds_spent() -> float:
    """What all compiling of this process has taken so far, forward and backward."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]
