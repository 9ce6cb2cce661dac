"""What an export or its check reads: a model's tensors as float32 rows, with an adapter merged into them as they pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kitae.errors import ConfigError, ModelError
from kitae.export.adapter import HEAD, Change
from kitae.export.bases import base_and_adapter, match_adapter
from kitae.export.weights import Rows, Weights, open_weights
from kitae.models import files

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model as it is, or a base with an adapter on it."""

    weights: Weights
    config: dict[str, Any]
    adapter: Path | None = None
    changes: Mapping[str, Change] = field(default_factory=dict)
    """What the adapter does to each tensor."""
    head_from: str | None = None
    """The embeddings, where the head that shared them now differs and is stored nowhere."""

    @property
    def folder(self) -> Path:
        """Where the tokenizer is."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer.json").is_file()
        return self.adapter if has_own and self.adapter is not None else self.weights.folder

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return [*self.weights.tensors, *([HEAD] if self.head_from else [])]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, whatever it is stored as."""
        return self.weights.shape(self._stored(name))

    def open(self, name: str) -> Rows:
        """How to read a tensor's rows in float32; the first dimension counts rows."""
        stored = self._stored(name)
        rows, change = self.weights.open(stored), self.changes.get(name)
        block = self.weights.block[0] if stored in self.weights.scales else 1
        changed = change.open(is_fused=len(self.shape(name)) == 3) if change else None

        def read(start: int, stop: int) -> Any:
            first = start - start % block  # scales count from a block's first row
            x = rows(first, stop)[start - first :]
            return changed(x, start) if changed else x

        return read

    def _stored(self, name: str) -> str:
        return self.head_from if name == HEAD and self.head_from else name


def open_source(name: str, *, base: str | None = None, dequantize: bool = False) -> Source:
    """A model folder, a run, or an adapter on the base it names or on `base`.

    Weights stored in 4 bits are refused unless `dequantize`.
    """
    folder = files.find_folder(name)
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise ConfigError(f"--base has no effect: {name} is no adapter; leave it out")
        found = files.find_model(name)
        weights = open_weights(found.folder)
        config = files.read_json(found.folder / "config.json")
        _check_stored(weights, config, dequantize=dequantize)
        return Source(weights=weights, config=config)
    base_folder, adapter = base_and_adapter(name, base)
    weights = open_weights(base_folder)
    config = files.read_json(base_folder / "config.json")
    _check_stored(weights, config, dequantize=dequantize)
    matched, head_from = match_adapter(weights, config, adapter)
    return Source(
        weights=weights, config=config, adapter=adapter, changes=matched.changes, head_from=head_from
    )


def _check_stored(weights: Weights, config: Mapping[str, Any], *, dequantize: bool) -> None:
    folder = weights.folder
    method = (config.get("quantization_config") or {}).get("quant_method")
    if weights.packed:
        if not dequantize:
            raise ModelError(
                f"{folder} is stored in 4 bits; name the full-precision model it was made of (for an adapter with "
                "--base), or say --dequantize to take the rounded weights"
            )
        log.warning("taking %s as dequantized from 4 bits: rounded weights", folder)
    elif dequantize:
        raise ConfigError(f"--dequantize has no effect: {folder} is not stored in 4 bits; leave it out")
    elif method is not None and not (method == "fp8" and weights.scales):
        raise ModelError(
            f"{folder} is stored as {method!r}, which kitae cannot read; name the full-precision model"
        )
