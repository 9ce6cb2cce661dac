"""Which base an adapter is merged into, and whether the two belong together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kitae.errors import ConfigError, ModelError
from kitae.export import fp8
from kitae.export.adapter import HEAD, Adapter, read_adapter
from kitae.export.weights import Weights
from kitae.models import files

log = logging.getLogger(__name__)

EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


def base_and_adapter(adapter: str, base: str | None) -> tuple[Path, Path]:
    """Folders of the base, `base` or else the one the adapter names, and of the adapter."""
    folder = files.find_folder(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{adapter} has no adapter_config.json, so there is no adapter to merge")
    if base is None:
        found = files.find_model(adapter)
        return found.folder, folder
    found = files.find_model(base)
    if found.adapter is not None:
        raise ModelError(f"--base {base} is an adapter itself; merge that one first, and name the result")
    return found.folder, folder


def check_base(weights: Weights, config: Mapping[str, Any], *, dequantize: bool, to_fp8: bool) -> None:
    """Refuse a base that no adapter can be merged into as it is stored."""
    folder = weights.folder
    method = (config.get("quantization_config") or {}).get("quant_method")
    if weights.packed:
        if not dequantize:
            raise ModelError(
                f"the base {folder} is stored in 4 bits; name the full-precision model it was made of with --base, or "
                "say --dequantize to merge into the rounded weights"
            )
        log.warning("merging into %s as dequantized from 4 bits: rounded weights, now in bfloat16", folder)
        return
    if dequantize:
        raise ConfigError(f"--dequantize has no effect: {folder} is not stored in 4 bits; leave it out")
    if method is not None and not (method == "fp8" and weights.scales):
        raise ModelError(
            f"the base {folder} is stored as {method!r}; name the full-precision model it was made of with --base"
        )
    if to_fp8 and weights.scales and weights.block != fp8.BLOCK:
        raise ModelError(
            f"{folder} has FP8 blocks of {weights.block[0]} x {weights.block[1]}, and kitae writes 128 x 128 only; "
            "leave --dtype out for a BF16 model"
        )


def match_adapter(
    weights: Weights, config: dict[str, Any], adapter_folder: Path
) -> tuple[Adapter, str | None]:
    """An adapter on this base, and the embeddings' name where the head that shared them gets weights of its own.

    `config` is changed to say so.
    """
    shapes = {name: weights.shape(name) for name in weights.tensors}
    embedding = next((n for n in shapes if n.endswith(EMBEDDINGS)), None)
    is_tied = embedding is not None and (bool(config.get("tie_word_embeddings")) or HEAD not in shapes)
    stores_head = HEAD in shapes
    if is_tied and embedding is not None:
        shapes.setdefault(HEAD, shapes[embedding])
    found = read_adapter(adapter_folder, shapes)
    files.require_same_family(adapter_folder, weights.folder)  # after the shapes, which say more
    if not found.is_trained:
        raise ModelError(
            f"{adapter_folder} changes nothing: all its B are zero, so merged it would equal the base; was it trained?"
        )
    keeps_tie = found.is_head_tied or not (HEAD in found.changes or embedding in found.changes)
    if is_tied and not keeps_tie:
        config["tie_word_embeddings"] = False
        log.warning(
            "the head had the embeddings' weights, and now gets its own: the adapter changed one of them"
        )
    return found, embedding if is_tied and not keeps_tie and not stores_head else None
