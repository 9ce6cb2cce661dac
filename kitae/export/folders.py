"""The folder of an export: made beside its final name, filled, and renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kitae.errors import RunDirError
from kitae.export.disk import os_errors
from kitae.export.gate import REPORT
from kitae.export.shards import MANIFEST, Shard
from kitae.export.weights import INDEX
from kitae.train.files import read_json, sync_folder, write_atomic
from kitae.train.folder import OURS, SUPERVISORS, Lock

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "kitae_template.json",
)  # fmt: skip
"""What belongs together: an adapter with a tokenizer of its own brings all of it."""
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz"
)  # fmt: skip
MORE_TEMPLATES = "additional_chat_templates"


def stamp(path: Path) -> list[Any]:
    """What tells that a file is still the same: name, size, time of its last change."""
    found = path.stat()
    return [path.name, found.st_size, found.st_mtime_ns]


def partial_of(output: Path) -> Path:
    """Where an export is while it is not whole."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def prepare(
    output: Path, sources: Sequence[Path], *, identity: Mapping[str, Any], overwrite: bool
) -> Iterator[Path]:
    """The folder to write to, locked: NAME.partial, or NAME itself where the same export is there already."""
    for source in sources:
        if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
            raise RunDirError(f"--output {output} holds {source}, which is read; choose another folder")
    with os_errors(output):
        is_taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    folder = partial_of(output)
    if is_taken:
        if _is_same(output, identity):
            folder = output
        elif not overwrite:
            raise RunDirError(f"--output {output} is not empty; choose another folder, or say --overwrite")
        elif not (output / "config.json").is_file():
            raise RunDirError(
                f"--output {output} is no model folder, so it is not overwritten; choose another"
            )
    if overwrite and folder != output and folder.exists() and not _is_same(folder, identity):
        stopped = Lock(folder / "lock")
        drop(folder)
        stopped.release()
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / "lock")
    try:
        yield folder
    finally:
        (folder / "lock").unlink(missing_ok=True)
        lock.release()


def _is_same(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder holds this export, whole or not."""
    manifest = read_json(folder / MANIFEST) if folder.is_dir() else None
    return manifest is not None and manifest.get("identity") == json.loads(json.dumps(dict(identity)))


def carry(folder: Path, base: Path, adapter: Path | None) -> None:
    """Copy tokenizer, templates, generation config and whatever else the model has; the adapter's own come first."""
    left_out = {INDEX, MANIFEST, REPORT, "config.json", *ADAPTER_FILES, *OURS, *SUPERVISORS}
    found = {
        path.name: path
        for path in base.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.suffix not in WEIGHT_SUFFIXES
        and path.name not in left_out
    }  # fmt: skip
    templates = base / MORE_TEMPLATES
    if adapter is not None:
        if (adapter / "tokenizer.json").is_file():
            found = {name: path for name, path in found.items() if name not in TOKENIZER_FILES}
            templates = adapter / MORE_TEMPLATES
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (adapter / name).is_file():
                found[name] = adapter / name
    with os_errors(folder):
        for name, path in found.items():
            write_atomic(folder / name, path.read_bytes())
        if templates.is_dir():
            (folder / MORE_TEMPLATES).mkdir(exist_ok=True)
            for path in templates.glob("*.jinja"):
                write_atomic(folder / MORE_TEMPLATES / path.name, path.read_bytes())


def write_index(folder: Path, plan: Sequence[Shard], *, has_index: bool) -> None:
    """The index of all tensors, where there are several files."""
    if not has_index:
        return
    outputs = [(output, shard) for shard in plan for item in shard.items for output in item.outputs]
    index = {
        "metadata": {"total_size": sum(output.num_bytes for output, _ in outputs)},
        "weight_map": {output.name: shard.name for output, shard in sorted(outputs, key=lambda o: o[0].name)},
    }
    _write(folder / INDEX, index)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json; it comes last, so that a folder without it is no model yet."""
    _write(folder / "config.json", config)


def publish(folder: Path, output: Path) -> None:
    """Give a whole folder its name; what had the name before is removed when the new one is there."""
    if folder == output:
        return
    with os_errors(output):
        (folder / "lock").unlink(missing_ok=True)
        sync_folder(folder)
        old = output.with_name(f".del-{output.name}")
        if old.exists():
            shutil.rmtree(old)
        if output.exists():
            os.rename(output, old)
        os.rename(folder, output)
        sync_folder(output.parent)
        if old.exists():
            shutil.rmtree(old)


def drop(folder: Path) -> None:
    """Remove an export that is not to be gone on with."""
    with os_errors(folder):
        shutil.rmtree(folder)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with os_errors(path):
        write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
