"""The searches for scales of blocks.py, compiled (kernels/scales.cpp): the same candidates, many times faster.

Sums are taken in another order, so of two nearly equal candidates the other may win; nothing else differs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from kitae.compiler import BuildError, Source, load_library

log = logging.getLogger(__name__)

KERNELS = Path(__file__).parent / "kernels"
ARGUMENTS = {
    "kitae_symmetric_scales": [c_void_p, c_int64, c_void_p],
    "kitae_scales_and_offsets": [c_void_p, c_int64, c_int, c_double, c_int, c_void_p, c_void_p],
}
SOURCE = Source(
    main=KERNELS / "scales.cpp",
    folders=[KERNELS.parents[1] / "rollout" / "kernels"],
    functions=list(ARGUMENTS),
    purpose="export",
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled at the first call on this machine; None, said once, where they cannot be."""
    try:
        loaded = load_library(SOURCE)
    except BuildError as error:
        log.info(
            "searching scales with torch's own operations instead of kernels, which is slower: %s", error
        )
        return None
    for name, types in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded


def symmetric_scales(kernels: ctypes.CDLL, x_BPE: Tensor) -> Tensor:
    """blocks.symmetric_scales of parts of 16."""
    x, scale = x_BPE.contiguous(), torch.empty(x_BPE.shape[:2])
    assert x.shape[-1] == 16 and x.dtype == torch.float32, (x.shape, x.dtype)
    kernels.kitae_symmetric_scales(x.data_ptr(), scale.numel(), scale.data_ptr())
    return scale


def scales_and_offsets(
    kernels: ctypes.CDLL, x_BPE: Tensor, *, levels: int, first: float, steps: int
) -> tuple[Tensor, Tensor]:
    """blocks.scales_and_offsets of parts of 32."""
    x, scale, offset = x_BPE.contiguous(), torch.empty(x_BPE.shape[:2]), torch.empty(x_BPE.shape[:2])
    assert x.shape[-1] == 32 and x.dtype == torch.float32, (x.shape, x.dtype)
    kernels.kitae_scales_and_offsets(
        x.data_ptr(), scale.numel(), levels, first, steps, scale.data_ptr(), offset.data_ptr()
    )
    return scale, offset
