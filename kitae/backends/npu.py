"""Huawei Ascend NPUs, where the torch_npu package is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kitae.backends import Feature, Recording


class NpuBackend:
    name = "npu"
    process_group = "hccl"
    preference = 20
    tokens_per_forward: int | None = None

    def is_available(self) -> bool:
        return importlib.util.find_spec("torch_npu") is not None and bool(self._module().is_available())

    def prepare(self) -> None:
        return

    def count(self) -> int:
        return int(self._module().device_count())

    def supports(self, feature: Feature) -> tuple[bool, str]:
        missing = {
            "nf4": "bitsandbytes has no NPU kernels",
            "float8": "its casts to and from it are not known to be exact",
            "flex_attention": "its compiler, triton, has no NPUs",
            "triton": "it has no NPUs",
            "recording": "it is not written for NPUs",
        }
        return feature not in missing, missing.get(feature, "every such NPU does")

    def device(self, local_rank: int) -> torch.device:
        return torch.device("npu", local_rank)

    def memory(self, device: torch.device) -> tuple[int, int]:
        free, total = self._module().mem_get_info(device)
        return int(free), int(total)

    def peak_memory(self, device: torch.device) -> int:
        return int(self._module().max_memory_allocated(device))

    def synchronize(self, device: torch.device) -> None:
        self._module().synchronize(device)

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def rng_state(self, device: torch.device) -> Tensor:
        state: Tensor = self._module().get_rng_state(device)
        return state

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        self._module().set_rng_state(state, device)

    def record(self, work: Callable[[], Tensor], *, pool: Any = None) -> Recording:
        raise RuntimeError("this device cannot record work")

    def _module(self) -> Any:
        """torch.npu, which importing torch_npu adds; typed Any because torch's own stubs do not have it."""
        importlib.import_module("torch_npu")
        return vars(torch)["npu"]


BACKEND = NpuBackend()
