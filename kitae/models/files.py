"""Where a model's files are, and what may be read of them: safetensors and JSON, checked before use."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitae.errors import ModelError

HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
"""What is downloaded of a hub model: weights, configuration, tokenizer and template, no code and no pickles."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TAGGED_FLOATS = ("Infinity", "-Infinity", "NaN")
"""Numbers that JSON has not, as transformers writes them: {"__float__": "Infinity"}."""
MAX_HEADER_BYTES = 16 << 20
ELEMENT_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Folders a model is loaded from."""

    folder: Path
    """Of config.json and the weights."""
    name: str
    """What an adapter's file says its base is: the hub id, or the absolute folder."""
    adapter: Path | None = None
    """Folder of an adapter on top of it."""


def find_model(name_or_path: str, *, revision: str | None = None, with_code: bool = False) -> ModelFiles:
    """The folders of a model folder, a run directory, an adapter folder, or a hub id, which is downloaded."""
    folder = find_folder(name_or_path, revision=revision, with_code=with_code)
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not base:
            raise ModelError(
                f"{folder}/adapter_config.json names no base_model_name_or_path; write the base in there"
            )
        try:
            found = find_model(str(base), with_code=with_code)
        except ModelError as error:
            raise ModelError(
                f"the base of {folder}: {error} (set: base_model_name_or_path in {folder}/adapter_config.json; a relative "
                "path counts from the present folder)"
            ) from error
        if found.adapter is not None:
            raise ModelError(f"{folder} is an adapter on {base}, an adapter itself; merge that one first")
        return ModelFiles(folder=found.folder, name=found.name, adapter=folder)
    if not (folder / "config.json").is_file():
        if (folder / "run.json").is_file():
            raise ModelError(f"{folder} is a run that has no final model yet; resume it with --resume")
        raise ModelError(
            f"{folder} has neither config.json nor adapter_config.json, so it is no model folder"
        )
    is_local = Path(name_or_path).expanduser().is_dir()
    return ModelFiles(folder=folder, name=str(folder.resolve()) if is_local else name_or_path)


def require_same_family(adapter: Path, base: Path) -> None:
    """Refuse an adapter that names a base of another family than `base`, which may have the same shapes.

    What it names is looked at only where that is a folder here.
    """
    if not (adapter / "adapter_config.json").is_file():
        return
    named = str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    config = Path(named).expanduser() / "config.json"
    if not named or not config.is_file():
        return
    own, other = (read_json(path).get("model_type") for path in (config, base / "config.json"))
    if own != other:
        raise ModelError(
            f"the adapter {adapter} was trained on {named}, of the family {own}, and {base} is of {other}; name a base of "
            "its own family"
        )


def find_folder(name_or_path: str, *, revision: str | None = None, with_code: bool = False) -> Path:
    """The local folder of that name, else the hub model's, downloaded with progress; a stopped download resumes."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"{name_or_path} is a file; name the folder that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name_or_path):
        raise ModelError(f"no such folder: {name_or_path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*HUB_FILES, "*.py"] if with_code else HUB_FILES
    here = f"{name_or_path} is no folder here"
    try:
        return Path(
            snapshot_download(
                name_or_path, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name_or_path} asks for consent on the hub; accept its terms, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name_or_path} has no revision {revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"{here}, and the hub knows no such model; check the spelling") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{here}, and it cannot be downloaded ({str(error).splitlines()[0]}); check the path, or download it "
            "where there is a network and name its folder"
        ) from error


def weight_files(folder: Path) -> dict[str, Path]:
    """In which safetensors file each tensor lies; every file's header is checked."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        mapping = read_json(index).get("weight_map")
        names = sorted(set(mapping.values())) if isinstance(mapping, dict) else []
        if not names or not all(
            isinstance(n, str) and n == Path(n).name and n.endswith(".safetensors") for n in names
        ):
            raise ModelError(f"{index} names shards that are not plain .safetensors file names")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        hint = (
            f"; {pickled[0]} is a pickle, which can run code when read: convert it once, where you trust it, with "
            "transformers' save_pretrained"
            if pickled
            else ""
        )
        raise ModelError(f"{folder} has no .safetensors weights{hint}")
    return {name: file for file in files for name in header(file)}


def header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor of a safetensors file, checked against its size before anything is allocated."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ModelError(
                    f"{file} is not a whole safetensors file: a header of {length:,} bytes in {size:,}"
                )
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        found = {name: (e["dtype"], e["shape"], e["data_offsets"]) for name, e in entries.items()}
    except FileNotFoundError as error:
        raise ModelError(
            f"{file} is missing, though the model's index names it; download it again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} has a damaged safetensors header ({error}); download it again") from error
    for name, (dtype, shape, (start, stop)) in found.items():
        if min(shape, default=0) < 0 or math.prod(shape) * ELEMENT_BITS.get(dtype, 0) != 8 * (stop - start):
            raise ModelError(
                f"{file}: {name} is said to be {dtype} {shape}, but holds {stop - start:,} bytes"
            )
        if max(shape, default=0) > 2**40:
            raise ModelError(f"{file}: {name} has an impossible shape {shape}")
    data = max((stop for _, _, (_, stop) in found.values()), default=0)
    if size != 8 + length + data:
        raise ModelError(
            f"{file} is {size:,} bytes long, its header says {8 + length + data:,}; download it again"
        )
    return {name: (dtype, shape) for name, (dtype, shape, _) in found.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json without what could name code: auto_map, trust_remote_code, and keys that begin with "_"."""
    config: dict[str, Any] = _without_code(read_json(folder / "config.json"))
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder}/config.json has no model_type, so the architecture is unknown")
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a model."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__} where a JSON object belongs")
    return value


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        tag = value.get("__float__") if len(value) == 1 else None
        return float(tag) if tag in TAGGED_FLOATS else dict(_harmless(value))
    return [_without_code(item) for item in value] if isinstance(value, list) else value


def _harmless(value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if not key.startswith("_") and key not in ("auto_map", "trust_remote_code", "attn_implementation"):
            yield key, _without_code(item)
