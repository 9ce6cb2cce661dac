"""Models to export: saved with shards of a few KiB, in BF16, or in FP8 as DeepSeek releases it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

BLOCK = 128
QUANTIZATION = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]
}  # fmt: skip


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def write_model(folder: Path, tensors: dict, *, shards: int = 1, config: dict | None = None) -> Path:
    """A folder of these tensors, dealt out to several files in turn, so that scales lie apart from their weights."""
    folder.mkdir(parents=True, exist_ok=True)
    names, files = sorted(tensors), {}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for i in range(shards if shards > 1 else 0):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    if files:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "deepseek_v3"}))
    return folder


def random_fp8(rows: int, columns: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its scales."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return weight, torch.rand(-(-rows // BLOCK), -(-columns // BLOCK), generator=generator) * 0.01 + 1e-4


def slow_dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition: w.to(float32) * scale_inv[block], in float32, block by block."""
    out = torch.empty(weight.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            out[block] = weight[block].to(torch.float32) * scale[i, j].float()
    return out


def slow_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of the way back: scale_inv = amax / 448 of each block, 1 where all is zero."""
    shape = -(-x.shape[0] // BLOCK), -(-x.shape[1] // BLOCK)
    scale, out = torch.empty(shape), torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    for i in range(shape[0]):
        for j in range(shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            amax = x[block].float().abs().max()
            scale[i, j] = amax / 448 if amax else 1.0
            out[block] = (x[block].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return out, scale


@pytest.fixture
def fp8_model(tmp_path):
    """A small FP8 checkpoint of odd sizes in three files, with what else lies in a release."""
    tensors = {
        "model.embed_tokens.weight": torch.randn(40, 16).bfloat16(),
        "model.layers.0.input_layernorm.weight": torch.randn(16).bfloat16(),
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.randn(8),
        "lm_head.weight": torch.randn(40, 16).bfloat16(),
    }
    sizes = {
        "q_a_proj": (128, 256),
        "kv_a_proj_with_mqa": (576, 130),
        "o_proj": (7, 5),
        "kv_b_proj": (300, 1000),
    }
    for seed, (name, size) in enumerate(sizes.items()):
        weight = f"model.layers.0.self_attn.{name}.weight"
        tensors[weight], tensors[f"{weight}_scale_inv"] = random_fp8(*size, seed=seed)
    config = {"model_type": "deepseek_v3", "torch_dtype": "bfloat16", "quantization_config": QUANTIZATION}
    folder = write_model(tmp_path / "fp8", tensors, shards=3, config=config)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_x.py"):
        (folder / name).write_text(f"this is {name}")
    return folder
