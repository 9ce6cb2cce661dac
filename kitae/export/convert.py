"""The three exports: FP8 to BF16, BF16 to FP8, and a LoRA adapter merged into its base.

Each tensor of the source becomes one of the output, by rows: read -> float32 -> + scale B A -> BF16, or FP8 by blocks.
What nothing happens to is copied byte by byte.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kitae.errors import ConfigError, ModelError, RunDirError
from kitae.export import folders, fp8, gate, shards
from kitae.export.adapter import HEAD, Adapter, Change
from kitae.export.bases import base_and_adapter, check_base, match_adapter
from kitae.export.shards import Item, Output, Pieces, Progress, Shard
from kitae.export.weights import (
    CPU,
    DTYPES,
    FLOATS,
    FP8,
    SCALE_SUFFIX,
    Weights,
    open_weights,
    read_bytes,
)
from kitae.models import files

log = logging.getLogger(__name__)

CHUNK = 1 << 18
"""Elements of a tensor that are worked on at a time: few enough for a core's cache."""
ScaleFormat = Literal["float32", "ue8m0"]


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What all exports have in common."""

    output: Path
    overwrite: bool = False
    num_workers: int = 0
    """Threads; 0 takes as many as there are cores."""
    check: gate.Check | None = None
    """What an export must pass before it gets its name; None gives it the name as it is."""
    device: torch.device = CPU
    """Where FP8 blocks are computed; merging stays on the CPU."""

    @property
    def threads(self) -> int:
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.num_workers or own


def fp8_to_bf16(model: str, how: How, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write a block-scaled FP8 model as BF16; the report says how many tensors were converted."""
    folder = _model_folder(model)
    weights = open_weights(folder)
    if not weights.scales:
        raise ModelError(f"{folder} has no FP8 weights, so there is nothing to convert")
    config = files.read_json(folder / "config.json")
    config.pop("quantization_config", None)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
    plan = _shards(weights, lambda name: _item(weights, name, device=how.device))
    report = _export("fp8-to-bf16", weights, plan, config, how, progress=progress)
    return {**report, "converted": len(weights.scales)}


def bf16_to_fp8(
    model: str, how: How, *, scale_format: ScaleFormat = "float32", progress: Progress | None = None
) -> dict[str, Any]:
    """Write a model's linears as block-scaled FP8, those that DeepSeek's releases have in FP8.

    scale_format ue8m0 rounds each scale up to a power of two.
    """
    folder = _model_folder(model)
    weights = open_weights(folder)
    config = files.read_json(folder / "config.json")
    _require_plain(weights, config)
    chosen = _to_quantize(weights)
    is_power = scale_format == "ue8m0"
    config["quantization_config"] = _quantization(config, weights, chosen, power_of_two=is_power)
    plan = _shards(
        weights,
        lambda name: _item(weights, name, to_fp8=name in chosen, power_of_two=is_power, device=how.device),
    )
    report = _export(
        "bf16-to-fp8", weights, plan, config, how, options={"scale_format": scale_format}, progress=progress
    )
    return {**report, "converted": len(chosen)}


def merge(
    adapter: str,
    how: How,
    *,
    base: str | None = None,
    dtype: Literal["auto", "fp8"] = "auto",
    scale_format: ScaleFormat = "float32",
    dequantize: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge a LoRA adapter into its base, or into `base`; the report says how many tensors changed.

    dtype auto keeps each tensor's own, and makes BF16 of weights in FP8 or 4 bits. A base stored in 4 bits is refused
    unless `dequantize`.
    """
    folder, adapter_folder = base_and_adapter(adapter, base)
    weights = open_weights(folder)
    config = files.read_json(folder / "config.json")
    check_base(weights, config, dequantize=dequantize, to_fp8=dtype == "fp8")
    own_format = (config.get("quantization_config") or {}).get("scale_fmt", "float32")
    if weights.scales and dtype == "fp8" and scale_format == "ue8m0" != own_format:
        raise ConfigError(
            f"scale_format is ue8m0, but the FP8 weights of {folder} that stay as they are have scales in {own_format}; "
            "leave it out"
        )
    found, untied = match_adapter(weights, config, adapter_folder)

    was_fp8 = bool(weights.scales)
    is_power = scale_format == "ue8m0" or own_format == "ue8m0"
    chosen = set(weights.scales) if was_fp8 else _to_quantize(weights) if dtype == "fp8" else set()
    if dtype == "fp8" and not was_fp8:
        config["quantization_config"] = _quantization(config, weights, chosen, power_of_two=is_power)
    elif dtype != "fp8":
        config.pop("quantization_config", None)
        if was_fp8 or weights.packed:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"

    def make(name: str, source: str | None = None) -> Item[Output]:
        return _item(
            weights,
            name,
            source=source,
            change=found.changes.get(name),
            to_fp8=dtype == "fp8" and name in chosen,
            power_of_two=is_power,
        )

    plan = _shards(weights, make, head_from=untied)
    report = _export(
        "merge",
        weights,
        plan,
        config,
        how,
        adapter=found,
        options={"dtype": dtype, "scale_format": scale_format, "dequantize": dequantize},
        progress=progress,
    )
    return {**report, "base": str(folder), "adapted": len(found.changes)}


# what is there -------------------------------------------------------------------------------------------------


def _model_folder(name: str) -> Path:
    found = files.find_model(name)
    if found.adapter is not None:
        raise ModelError(f"{name} is an adapter; merge it first with kitae export merge {name} --output ...")
    return found.folder


def _require_plain(weights: Weights, config: Mapping[str, Any]) -> None:
    if weights.scales:
        raise ModelError(f"{weights.folder} is in FP8 already")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ModelError(
            f"{weights.folder} is stored as {method!r}; FP8 is made of full-precision weights, so take those"
        )


def _to_quantize(weights: Weights) -> set[str]:
    chosen = {
        name
        for name, stored in weights.tensors.items()
        if (stored.dtype in FLOATS or name in weights.packed)
        and fp8.is_converted(name, dims=len(weights.shape(name)))
    }
    if not chosen:
        raise ModelError(
            f"{weights.folder} has no linears of layers by names that end in _proj.weight, which are what becomes FP8"
        )
    return chosen


def _quantization(
    config: Mapping[str, Any], weights: Weights, chosen: set[str], *, power_of_two: bool
) -> dict[str, Any]:
    """quantization_config as in DeepSeek's releases; for other models with the linears that stay as they are."""
    found: dict[str, Any] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    if power_of_two:
        found["scale_fmt"] = "ue8m0"
    found["weight_block_size"] = list(fp8.BLOCK)
    if not str(config.get("model_type")).startswith("deepseek"):
        others = {
            n.removesuffix(".weight") for n in weights.tensors if n.endswith(".weight") and n not in chosen
        }
        plain = {
            n for n in others if len(weights.shape(f"{n}.weight")) == 2 and not n.endswith("embed_tokens")
        }
        found["modules_to_not_convert"] = sorted(plain | {"lm_head"})
    return found


# tensor by tensor ----------------------------------------------------------------------------------------------


def _shards(
    weights: Weights, make: Callable[..., Item[Output]], *, head_from: str | None = None
) -> list[Shard]:
    """The source's files with the tensors each gets; a head of its own goes where the embeddings are."""
    found: dict[Path, list[Item[Output]]] = {path: [] for path in weights.files}
    for name, stored in weights.tensors.items():
        found[stored.file].append(make(name))
    if head_from is not None:
        found[weights.tensors[head_from].file].append(make(HEAD, head_from))
    return [Shard(path.name, items) for path, items in found.items() if items]


def _item(
    weights: Weights,
    name: str,
    *,
    source: str | None = None,
    change: Change | None = None,
    to_fp8: bool = False,
    power_of_two: bool = False,
    device: torch.device = CPU,
) -> Item[Output]:
    """How tensor `name` of the output is made of `source` (else the same name) of the model."""
    source = source or name
    stored, shape = weights.tensors[source], weights.shape(source)
    is_fp8, is_packed = source in weights.scales, source in weights.packed
    if change is not None and not (is_fp8 or is_packed or stored.dtype in FLOATS):
        raise ModelError(
            f"{weights.folder}: {source} is stored as {stored.dtype}, which no adapter can change"
        )
    if change is None and is_fp8 == to_fp8 and not is_packed and (is_fp8 or not to_fp8):
        kept = [Output(name, stored.dtype, shape)]
        parts = [stored]
        if is_fp8:
            parts.append(weights.scales[source])
            kept.append(Output(name + SCALE_SUFFIX, parts[1].dtype, parts[1].shape))
        return Item(kept, lambda: _copy(parts))
    if not to_fp8:
        kind = "BF16" if is_fp8 or is_packed else stored.dtype
        return Item([Output(name, kind, shape)], lambda: _plain(weights, source, change, kind, device))
    grid = fp8.Grid(rows=shape[0], columns=shape[1], block=fp8.BLOCK)
    scale_kind = "F32"
    if is_fp8 and power_of_two and weights.scales[source].dtype == "F8_E8M0":
        scale_kind = "F8_E8M0"
    outputs = [Output(name, FP8, shape), Output(name + SCALE_SUFFIX, scale_kind, grid.shape)]
    return Item(
        outputs, lambda: _quantized(weights, source, change, DTYPES[scale_kind], power_of_two, device)
    )


def _copy(parts: list[Any]) -> Pieces:
    for which, stored in enumerate(parts):
        for start in range(0, stored.num_bytes, shards.READ_BYTES):
            yield which, read_bytes(stored, start, min(shards.READ_BYTES, stored.num_bytes - start))
    return False


def _plain(weights: Weights, source: str, change: Change | None, kind: str, device: torch.device) -> Pieces:
    is_changed = False
    height = weights.block[0] if source in weights.scales else 1
    for before, after in _values(weights, source, change, height=height, device=device):
        out = after.to(DTYPES[kind])
        is_changed = is_changed or (before is not None and not torch.equal(out, before.to(DTYPES[kind])))
        yield 0, shards.as_bytes(fp8.require_finite(out, name=source) if change else out)
    return is_changed


def _quantized(
    weights: Weights,
    source: str,
    change: Change | None,
    scale_dtype: torch.dtype,
    power_of_two: bool,
    device: torch.device,
) -> Pieces:
    is_changed = False
    height = math.lcm(fp8.BLOCK[0], weights.block[0])
    for before, after in _values(weights, source, change, height=height, device=device):
        small, scale = fp8.quantize_rows(fp8.require_finite(after, name=source), power_of_two=power_of_two)
        is_changed = is_changed or (before is not None and not torch.equal(after, before))
        yield 0, shards.as_bytes(small)
        yield 1, shards.as_bytes(scale.to(scale_dtype))
    return is_changed


def _values(
    weights: Weights, source: str, change: Change | None, *, height: int, device: torch.device
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Rows in float32 as they are in the base (None where nothing changes them) and as they become.

    Of a matrix, a multiple of `height` at a time.
    """
    shape, rows = weights.shape(source), weights.open(source, device=device)
    step = height if len(shape) == 2 else 1
    per_row = math.prod(shape[1:])
    step *= max(1, CHUNK // max(1, step * per_row))
    changed = change.open(is_fused=len(shape) == 3) if change else None
    for start in range(0, shape[0], step):
        before = rows(start, min(start + step, shape[0]))
        yield (None, before) if changed is None else (before, changed(before, start))


# the folder ----------------------------------------------------------------------------------------------------


def _export(
    command: str,
    weights: Weights,
    plan: list[Shard],
    config: Mapping[str, Any],
    how: How,
    *,
    adapter: Adapter | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    sources = [weights.folder] if adapter is None else [weights.folder, adapter.folder]
    identity = {
        "command": command,
        "options": dict(options or {}),
        "source": [folders.stamp(path) for path in weights.files],
        "adapter": []
        if adapter is None
        else [folders.stamp(adapter.folder / n) for n in folders.ADAPTER_FILES],
    }
    with folders.prepare(how.output, sources, identity=identity, overwrite=how.overwrite) as folder:
        entries = shards.write(
            folder, plan, identity=identity, num_workers=how.threads, progress=progress or Progress()
        )
        changed = sum(entry["changed"] for entry in entries.values())
        if adapter is not None and not changed:
            folders.drop(folder)
            raise ModelError(
                f"no tensor changed: what the adapter {adapter.folder} adds is lost in the rounding of the base's "
                "weights, so the merged model would equal the base; nothing was written"
            )
        folders.carry(folder, weights.folder, None if adapter is None else adapter.folder)
        folders.write_index(folder, plan, has_index=len(weights.files) > 1)
        folders.write_config(folder, config)
        checked = gate.examine(how.check, folder, how.output)
        if checked is not None:
            gate.save(checked, folder)
        folders.publish(folder, how.output)
    if not how.output.is_dir():
        raise RunDirError(f"{how.output} vanished while it was written")
    report = {
        "command": command,
        "model": str(sources[-1]),
        "output": str(how.output),
        "shards": len(plan),
        "tensors": sum(len(shard.items) for shard in plan),
        "bytes": sum(entry["bytes"] for entry in entries.values()),
    }
    if adapter is not None:
        report["changed"] = changed
    return report if checked is None else {**report, "verify": checked}
