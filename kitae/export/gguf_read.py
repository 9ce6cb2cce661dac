"""A GGUF file read back by the gguf package: its metadata, and its tensors as float32 rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from kitae.errors import ModelError
from kitae.export.gguf_file import require_gguf
from kitae.export.gguf_tensors import CHUNK, targets_of
from kitae.export.source import Source
from kitae.export.weights import Rows


@dataclass(frozen=True, slots=True)
class Opened:
    """A file's contents, mapped."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]
    """gguf.ReaderTensor by name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """In torch's order."""
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def kind(self, name: str) -> str:
        return str(self.tensors[name].tensor_type.name)

    def rows(self, name: str) -> Iterator[Tensor]:
        """Float32 rows in pieces."""
        import gguf

        tensor = self.tensors[name]
        columns = self.shape(name)[-1]
        data = tensor.data.reshape(-1, tensor.data.shape[-1])
        step = max(1, CHUNK // columns)
        for start in range(0, len(data), step):
            values = gguf.dequantize(np.ascontiguousarray(data[start : start + step]), tensor.tensor_type)
            yield torch.from_numpy(np.array(values, np.float32).reshape(-1, columns))


def open_gguf(path: Path) -> Opened:
    """Open a file; one that is damaged or cut short is refused."""
    gguf = require_gguf()
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the package raises whatever the bytes led it to
        raise ModelError(f"{path} is no whole GGUF file ({type(error).__name__}: {error})") from error
    return Opened(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


class _Places(Source):
    """A source whose values are where they are: numbers that count on over all tensors."""

    def open(self, name: str) -> Rows:
        first = 0
        for other in self.names:
            if other == name:
                break
            first += math.prod(self.shape(other))
        shape = self.shape(name)
        places = torch.arange(first, first + math.prod(shape)).view(shape)
        return lambda start, stop: places[start:stop]


def write_back(opened: Opened, source: Source, folder: Path) -> None:
    """Write a file's weights as safetensors of the model it was made of: each value goes where it came from."""
    places = _Places(weights=source.weights, config=source.config, head_from=source.head_from)
    names = source.names
    sizes = [math.prod(source.shape(name)) for name in names]
    values = torch.zeros(sum(sizes))
    for target in targets_of(places):
        if target.name not in opened.tensors:
            raise ModelError(f"{opened.path} has no tensor {target.name}")
        if not target.sources:
            continue
        where = torch.cat([piece.reshape(-1) for piece in target.pieces()])
        what = torch.cat([piece.reshape(-1) for piece in opened.rows(target.name)])
        if where.shape != what.shape:
            raise ModelError(f"{opened.path}: {target.name} is {list(opened.shape(target.name))}")
        values[where] = what
    tensors = {
        name: part.view(source.shape(name)).clone()
        for name, part in zip(names, values.split(sizes), strict=True)
        if not (name == "lm_head.weight" and source.config.get("tie_word_embeddings"))
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_adapter(source: Source) -> Source:
    """The same base without what the adapter does to it."""
    return replace(source, changes={})
