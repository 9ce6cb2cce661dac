"""Weights in fewer bits: NF4 by bitsandbytes for frozen linears, and FP8 checkpoints read as plain weights.

NF4 is arXiv:2305.14314 (QLoRA), section 3. FP8 is DeepSeek-V3's layout (arXiv:2412.19437, section 3.3): weights in
float8 and one `weight_scale_inv` per block of 128 x 128, weight = float8 x scale.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitae.errors import MissingExtraError, ModelError

SCALE_SUFFIX = "_scale_inv"


def nf4_config(*, dtype: torch.dtype, keep: Iterable[str]) -> Any:
    """transformers' quantization setting that stores linears in NF4; modules named in `keep` stay as they are."""
    require_bitsandbytes("model.quantization nf4")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=sorted(keep),
    )


def keep_training_layout(causal_lm: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights when a model in eval mode runs on a CPU with avx512_bf16.

    The packed weights give other numbers (scales rounded to bfloat16), and once packed they let no gradient through, in
    training mode either: a run that evaluates or samples would go on training with wrong gradients.
    """
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def require_bitsandbytes(what: str) -> None:
    """Say how to install what 4-bit weights need."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"{what} needs bitsandbytes; pip install 'kitae[qlora]'")


def dequantize_fp8(
    weight: Tensor, scale_inv: Tensor, *, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """weight [rows, columns] times the scale of each element's block; blocks at the edges may be smaller."""
    rows, columns = weight.shape
    if scale_inv.shape != (-(-rows // block[0]), -(-columns // block[1])):
        raise ModelError(
            f"FP8 weight of {rows} x {columns} has {tuple(scale_inv.shape)} scales, "
            f"which blocks of {block[0]} x {block[1]} do not give"
        )
    scale = scale_inv.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (weight.float() * scale[:rows, :columns]).to(dtype)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight of an FP8 checkpoint that is read and dequantized only when transformers indexes it."""

    file: Path
    name: str
    scale_file: Path
    block: tuple[int, int]
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Tensor:
        weight, scale = _read(self.file, self.name), _read(self.scale_file, self.name + SCALE_SUFFIX)
        return dequantize_fp8(weight, scale, block=self.block, dtype=self.dtype)[index]


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """A tensor of the same checkpoint that was stored as it is, such as a norm."""

    file: Path
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return _read(self.file, self.name)[index]


def fp8_state(
    files: dict[str, Path], *, block: tuple[int, int], dtype: torch.dtype
) -> dict[str, Fp8Weight | PlainWeight]:
    """The checkpoint as names of plain weights; `files` says in which file each stored tensor lies."""
    return {
        name: Fp8Weight(file, name, files[name + SCALE_SUFFIX], block, dtype)
        if name + SCALE_SUFFIX in files
        else PlainWeight(file, name)
        for name, file in files.items()
        if not name.endswith(SCALE_SUFFIX)
    }


def _read(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
