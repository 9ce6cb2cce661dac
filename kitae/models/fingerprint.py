"""Which model exactly: one hash over its weights, configuration, tokenizer and adapter. Needs no torch."""

from __future__ import annotations

from pathlib import Path

import xxhash

from kitae.errors import ModelError
from kitae.models.files import ModelFiles

PART_BYTES = 16 << 20
KINDS = (".safetensors", ".json", ".jinja")
"""What a model is loaded from; a run's folder also holds files of ours, which change while the model does not."""
NOT_THE_MODEL = ("run.json", "status.json", "exit.json", "final.json", "trainer_state.json")


def model_parts(folder: Path) -> list[Path]:
    """The files of a model folder that decide what it answers."""
    return sorted(
        p for p in folder.iterdir() if p.suffix in KINDS and p.name not in NOT_THE_MODEL and p.is_file()
    )


def fingerprint(found: ModelFiles) -> str:
    """The same for equal files, wherever they lie; reads all of them once."""
    whole = xxhash.xxh3_128()
    for folder in (found.folder, found.adapter):
        for path in model_parts(folder) if folder is not None else ():
            whole.update(f"{path.name}\0{file_hash(path)}\0".encode())
    return whole.hexdigest()


def file_hash(path: Path) -> str:
    """Hash of a file's content."""
    hashed = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while part := file.read(PART_BYTES):
                hashed.update(part)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    return hashed.hexdigest()
