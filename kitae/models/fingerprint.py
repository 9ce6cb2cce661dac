"""What tells one model's weights, and one tokenizer's vocabulary, from another's without reading all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from kitae.models.files import ModelFiles

PLACES, SAMPLE_BYTES = 16, 1 << 16
"""Of each weight file this many places of so many bytes are read, its header and its end among them."""


def model_fingerprint(found: ModelFiles) -> str:
    """Hash of a model's configuration, and of the size, header and samples of its weight files, adapter included.

    A model of the same shape that was trained by even one more step differs in nearly every sample.
    """
    digest = xxhash.xxh3_128()
    for folder in (found.folder, found.adapter):
        if folder is None:
            continue
        for name in ("config.json", "adapter_config.json"):
            if (folder / name).is_file():
                digest.update((folder / name).read_bytes())
        for file in sorted(folder.glob("*.safetensors")):
            _add_samples(digest, file)
    return digest.hexdigest()


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Hash of a tokenizer's tokens and their ids. Any: a transformers tokenizer."""
    pairs = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return xxhash.xxh3_128_hexdigest(json.dumps(pairs).encode())


def _add_samples(digest: xxhash.xxh3_128, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name} {size}".encode())
    last = max(size - SAMPLE_BYTES, 0)
    with file.open("rb") as stream:
        for place in range(PLACES):
            stream.seek(last * place // (PLACES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
