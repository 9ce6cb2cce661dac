"""Checkpoints that are whole or not there: safetensors and JSON, hashed in a manifest, renamed into place.

state -> skeleton (JSON) + tensors -> .tmp-step_000100/rank_000.{json,safetensors} -> fsync -> manifest.json
      -> fsync -> rename to step_000100/ -> fsync of the parent -> old ones renamed to .del-… and removed

The hash is taken from the bytes in memory, never from a file read back: a file that a full disk cut short would
otherwise certify itself. Several ranks write side by side; rank 0 writes the manifest when all are done.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kitae.errors import CheckpointError, RunDirError
from kitae.parallel.world import World
from kitae.train.files import explain, free_bytes, human, sync_folder, write_all

FORMAT = 1
NAME = re.compile(r"step_(\d{6,})")
ASIDE = (".tmp-", ".del-")
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

State = dict[str, Any]  # nested dicts and lists of tensors and JSON values


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint that was read: this rank's state, and what the manifest says of the run that wrote it."""

    path: Path
    step: int
    state: State
    identity: dict[str, Any]


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, newest first, by their number and never by their date."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted((int(m[1]) for m in map(NAME.fullmatch, names) if m), reverse=True)


# ---------------------------------------------------------------------------------------------------- writing


def save(folder: Path, *, step: int, state: State, identity: Mapping[str, Any], world: World) -> Path:
    """Write a checkpoint of all ranks; it appears under its name whole, or not at all.

    A disk that is or becomes full raises RunDirError on every rank and leaves the older checkpoints as they are.
    """
    final, aside = folder / name_of(step), folder / f".tmp-{name_of(step)}"
    skeleton, tensors = pack(state)
    needed = sum(world.gather_json(_size(skeleton, tensors)))
    problem = _prepare(aside, needed=needed) if world.is_main else None
    if (problem := world.broadcast_json(problem)) is None:
        files, problem = _write_rank(
            aside, rank=world.rank, skeleton=skeleton, tensors=tensors, needed=needed
        )
        reports = world.gather_json([files, problem])
        problem = next((text for _, text in reports if text), None)
        if problem is None and world.is_main:
            manifest = {
                "format": FORMAT,
                "step": step,
                "world_size": world.world_size,
                "identity": dict(identity),
                "files": {name: entry for written, _ in reports for name, entry in written.items()},
            }
            problem = _publish(aside, final, manifest)
        problem = world.broadcast_json(problem)
    if problem is not None:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise RunDirError(f"checkpoint of step {step} not written: {problem}")
    return final


def require_space(
    folder: Path, state: State, *, world: World, grows_by: int = 0, is_one_kept: bool = False
) -> None:
    """Refuse a run whose disk cannot hold a checkpoint beside the one it replaces, with a tenth to spare.

    `grows_by` is how many bytes larger than `state` this rank's share of a checkpoint will be; is_one_kept: the one to
    be replaced is on the disk already.
    """
    size = sum(world.gather_json(_size(*pack(state)) + grows_by))
    needed = int((1.1 if is_one_kept else 2.2) * size)
    free = world.broadcast_json(free_bytes(folder) if world.is_main else None)
    if free is not None and free < needed:
        raise RunDirError(
            f"disk too small: need {human(needed)} for checkpoints, have {human(free)} at {folder}. One checkpoint "
            f"takes {human(size)}, and a new one is written before an old one is removed; make space, set output_dir "
            "to a larger disk, or make checkpoints smaller: lora.rank for adapters, or optim.name = adafactor"
        )


def prune(folder: Path, *, keep: int, pinned: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and the pinned steps, each renamed before it is deleted."""
    kept = [step for step in steps_in(folder) if step not in pinned]
    for step in kept[keep:]:
        _remove(folder / name_of(step))


def sweep(folder: Path) -> None:
    """Remove what a killed run left half written or half deleted."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(ASIDE):
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    doomed = path.with_name(f".del-{path.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _prepare(aside: Path, *, needed: int) -> str | None:
    try:
        aside.parent.mkdir(exist_ok=True)
        if aside.exists():
            shutil.rmtree(aside)
        free = free_bytes(aside.parent)
        if free is not None and free < needed:
            return f"disk full: need {human(needed)}, have {human(free)} at {aside.parent}; make space, then --resume"
        aside.mkdir()
    except OSError as error:
        return explain(error, aside, needed=needed)
    return None


def _write_rank(
    aside: Path, *, rank: int, skeleton: bytes, tensors: Mapping[str, Tensor], needed: int
) -> tuple[dict[str, Any], str | None]:
    """This rank's two files and their manifest entries, or the problem."""
    entries = {}
    parts = {f"rank_{rank:03d}.json": iter([skeleton]), f"rank_{rank:03d}.safetensors": _safetensors(tensors)}
    for name, chunks in parts.items():
        try:
            entries[name] = _write_hashed(aside / name, chunks)
        except OSError as error:
            return {}, explain(error, aside / name, needed=needed)
    return entries, None


def _publish(aside: Path, final: Path, manifest: Mapping[str, Any]) -> str | None:
    try:
        _write_hashed(aside / "manifest.json", iter([_render_manifest(manifest)]))
        sync_folder(aside)
        if final.exists():  # the same step, saved before a resume from an older one
            _remove(final)
        os.rename(aside, final)
        sync_folder(final.parent)
    except OSError as error:
        return explain(error, final)
    return None


def _write_hashed(path: Path, chunks: Iterator[bytes | memoryview]) -> dict[str, Any]:
    """Write, wait for the disk, and return size and hash of what was meant to be written."""
    digest, size = xxhash.xxh3_128(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            write_all(descriptor, chunk)
            digest.update(chunk)
            size += len(chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors format, one tensor at a time: length of the header, header, bytes of each tensor."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def _size(skeleton: bytes, tensors: Mapping[str, Tensor]) -> int:
    return len(skeleton) + sum(t.numel() * t.element_size() + 200 for t in tensors.values()) + 4096


def _render_manifest(manifest: Mapping[str, Any]) -> bytes:
    """One line that carries its own hash, so that a changed bit in it is noticed too."""
    body = json.dumps(manifest, sort_keys=True)
    digest = xxhash.xxh3_128(body.encode()).hexdigest()
    return f'{{"manifest": {body}, "xxh3_128": "{digest}"}}\n'.encode()


# ---------------------------------------------------------------------------------------------------- reading


def load_newest(folder: Path, *, world: World) -> tuple[Loaded | None, list[str]]:
    """The newest checkpoint whose manifest, hashes and content are whole, and a line for each one skipped.

    None where the folder holds no checkpoint at all. Checkpoints of which none is whole raise CheckpointError: a run
    never starts again from the beginning unless it is told to. All ranks agree on the step.
    """
    skipped: list[str] = []
    candidates: list[int] = world.broadcast_json(steps_in(folder) if world.is_main else None)
    for step in candidates:
        path = folder / name_of(step)
        loaded: Loaded | None = None
        problem = None
        try:
            loaded = read(path, rank=world.rank)
        except CheckpointError as error:
            problem = str(error)
        problems = [text for text in world.gather_json(problem) if text]
        if not problems:
            return loaded, skipped
        skipped.append(problems[0])
    if candidates:
        raise CheckpointError(
            f"no whole checkpoint in {folder}: " + "; ".join(skipped) + "; restore one from a backup, "
            "or start anew with --overwrite"
        )
    return None, skipped


def read(path: Path, *, rank: int) -> Loaded:
    """Read one rank's part of a checkpoint, checking every byte of it; CheckpointError says what is wrong."""
    try:
        raw = (path / "manifest.json").read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name}: manifest.json: {error.strerror}") from error
    try:
        manifest = json.loads(raw)["manifest"]
        is_whole = raw == _render_manifest(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: manifest.json is damaged ({type(error).__name__})") from error
    if not is_whole:
        raise CheckpointError(f"{path.name}: manifest.json is damaged (its hash does not match)")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path.name}: format {manifest['format']} was written by another version of kitae; this one reads {FORMAT}"
        )
    if rank >= manifest["world_size"]:
        rank = (
            0  # more ranks than before: Run refuses that by the manifest's identity, with the settings' names
        )
    names = (f"rank_{rank:03d}.json", f"rank_{rank:03d}.safetensors")
    for name in manifest["files"] if rank == 0 else names:
        _check(path / name, manifest["files"][name])
    skeleton = (path / names[0]).read_bytes()
    try:
        state = unpack(skeleton, load_file(path / names[1]))
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path.name}: {names[1]} cannot be read: {error}") from error
    return Loaded(path=path, step=manifest["step"], state=state, identity=manifest["identity"])


def set_aside(folder: Path, *, newer_than: int) -> None:
    """Rename damaged checkpoints newer than the resumed one, so that they do not count as the newest again."""
    for step in steps_in(folder):
        if step > newer_than:
            damaged = folder / f"damaged-{name_of(step)}"
            if damaged.exists():
                shutil.rmtree(damaged)
            os.rename(folder / name_of(step), damaged)


def _check(path: Path, entry: Mapping[str, Any]) -> None:
    digest, size = xxhash.xxh3_128(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise CheckpointError(f"{path.parent.name}: {path.name}: {error.strerror}") from error
    if size != entry["bytes"]:
        raise CheckpointError(f"{path.parent.name}: {path.name} has {size} bytes instead of {entry['bytes']}")
    if digest.hexdigest() != entry["xxh3_128"]:
        raise CheckpointError(f"{path.parent.name}: {path.name} is damaged (its hash does not match)")


# ---------------------------------------------------------------------------------------------------- state


def pack(state: State) -> tuple[bytes, dict[str, Tensor]]:
    """Nested state as JSON with tensors taken out: {"w": tensor} -> b'{"w": {"$tensor": "w"}}' and {"w": tensor}.

    Keys are strings and tuples come back as lists. Doubles round-trip exactly; NaN and infinities are spelt out.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_take_out(state, "", tensors), ensure_ascii=True).encode()
    return skeleton, tensors


def unpack(skeleton: bytes, tensors: Mapping[str, Tensor]) -> State:
    """The inverse of pack."""
    state: State = _put_back(json.loads(skeleton), tensors)
    return state


def _take_out(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        assert path not in tensors, f"two tensors of the state are called {path}"
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise TypeError(f"state{path}: key {key!r} must be a string that does not start with $")
        return {key: _take_out(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_out(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"state{path}: {type(value).__name__} is neither a tensor nor a JSON value")


def _put_back(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_back(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$float" in value:
        return float(value["$float"])
    return {key: _put_back(item, tensors) for key, item in value.items()}


# ---------------------------------------------------------------------------------------------------- randomness


def random_state(device: torch.device) -> State:
    """State of every global generator: Python's, NumPy's, torch's, and that of an accelerator."""
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # Any: numpy types it as a union
    state: State = {
        "python": [version, list(numbers), gauss],
        "numpy": {
            "key": numpy_state["state"]["key"].tolist(),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random_state(state: State, *, device: torch.device) -> None:
    """Put every global generator back to where random_state found it."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    saved = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(saved["key"], dtype=np.uint32), "pos": saved["pos"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)
