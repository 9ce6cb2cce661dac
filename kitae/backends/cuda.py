"""NVIDIA GPUs, and AMD's through ROCm, which torch calls cuda too."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kitae.backends import Feature, Recording


class CudaBackend:
    name = "cuda"
    process_group = "nccl"
    preference = 10
    tokens_per_forward: int | None = None

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def prepare(self) -> None:
        """Let freed memory grow together: packed passes differ in length, and blocks of other sizes could not be used.

        What the user has set is left alone, under either name.
        """
        names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the new one, and the one before
        if not any(name in os.environ for name in names):
            os.environ.update(dict.fromkeys(names, "expandable_segments:True"))

    def count(self) -> int:
        return torch.cuda.device_count()

    def supports(self, feature: Feature) -> tuple[bool, str]:
        if feature == "bfloat16":
            is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
            return is_fast, f"{torch.cuda.get_device_name()} {'has' if is_fast else 'has no'} bfloat16 units"
        if feature in ("flex_attention", "triton"):
            if importlib.util.find_spec("triton") is None:
                return False, "its compiler, triton, is not installed"
            return torch.cuda.get_device_capability() >= (
                8,
                0,
            ), "its kernels are written for capability 8.0 and later"
        return True, "every such GPU does"

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cuda", local_rank)

    def memory(self, device: torch.device) -> tuple[int, int]:
        return torch.cuda.mem_get_info(device)

    def peak_memory(self, device: torch.device) -> int:
        return torch.cuda.max_memory_allocated(device)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def rng_state(self, device: torch.device) -> Tensor:
        return torch.cuda.get_rng_state(device)

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        torch.cuda.set_rng_state(state, device)

    def record(self, work: Callable[[], Tensor], *, pool: Any = None) -> Recording:
        """As a CUDA graph. Before, everything is compiled and allocated by running once."""
        own, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(own)
        with torch.cuda.stream(stream):
            work()
        own.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The outer context is for failures, after which torch stays on the stream it records.
        with torch.cuda.stream(own), torch.cuda.graph(graph, pool=pool):
            result = work()
        return Recording(graph.replay, result, graph.pool())


BACKEND = CudaBackend()
