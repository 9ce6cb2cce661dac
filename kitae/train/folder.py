"""The run directory as a place: may it be used, who holds it, what in it is ours.

The directory is the interface to every other program (docs/architecture.md): the final model at its top, beside it
run.json status.json exit.json train.log metrics.jsonl events.jsonl samples.jsonl difficulty.jsonl resources.jsonl
tensorboard/ checkpoints/, and `lock`, which the running process holds.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kitae.config import home
from kitae.errors import ConfigError, LockedError, RunDirError
from kitae.train.files import (
    disk_errors,
    explain,
    read_json,
    sync_folder,
    sync_tree,
    write_all,
    write_json,
)
from kitae.train.logs import LOG_FILES

logger = logging.getLogger(__name__)

OURS = (
    "run.json", "status.json", "exit.json", "final.json", "lock", *LOG_FILES, "metrics.jsonl", "events.jsonl",
    "samples.jsonl", "difficulty.jsonl", "reference.jsonl", "calibration.json", "resources.jsonl", "tensorboard",
    "checkpoints", "wandb",
)  # fmt: skip
SUPERVISORS = ("alive", "stdout.log", "stderr.log")
"""What a supervisor that starts the run may have put there before."""
FIRST = ("lock", "train.log", ".tmp-run.json")
"""What a run that was killed while it was created may have left; run.json comes next and makes it a run."""


class Lock:
    """Exclusive use of a run directory, given back by the kernel when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise LockedError(_who_holds(path)) from error
        # A forked worker must not keep the lock when this process is killed.
        os.register_at_fork(after_in_child=self._close)
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        write_all(self._descriptor, json.dumps(owner).encode() + b"\n")

    def release(self) -> None:
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _who_holds(path: Path) -> str:
    owner = read_json(path) or {}
    return (
        f"{path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}, "
        f"started {owner.get('started', '?')}; wait for it, stop it, or choose another output_dir"
    )


def is_run(folder: Path) -> bool:
    """Whether a folder was written by kitae."""
    return "kitae_version" in (read_json(folder / "run.json") or {})


def claim(folder: Path, *, resume: bool, overwrite: bool, model: str | None) -> Lock:
    """Make sure a run may write to `folder`, create it, and lock it.

    A folder with anything in it is refused, except: with resume, a run; with overwrite, a run, whose own files are
    then removed; a run that ended before its first step and left only logs. `model` is what will be loaded, which
    must not be removed here.
    """
    if resume and overwrite:
        raise ConfigError(
            "resume and overwrite are both on: one continues the run in output_dir, one replaces it"
        )
    try:
        foreign = _foreign(folder)
        if foreign is not None:
            raise RunDirError(
                f"output_dir {folder} is not empty and not a kitae run (it holds {foreign}); choose another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / "lock")
    except ValueError as error:
        raise RunDirError(f"output_dir {str(folder)!r} is no usable path: {error}; choose another") from error
    except (OSError, RuntimeError) as error:
        raise _unusable(folder, error) from error
    try:
        if overwrite:
            _require_other_model(folder, model)
            with disk_errors(folder):
                clear(folder)
        elif not resume and has_steps(folder):
            raise RunDirError(
                f"output_dir {folder} already holds a run; continue it with --resume, replace it with --overwrite, "
                "or choose another folder"
            )
    except BaseException:
        lock.release()
        raise
    return lock


def _foreign(folder: Path) -> str | None:
    """Something in the folder that keeps a run from starting there, or None. A run may hold what it likes."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return None
    if not names or is_run(folder):
        return None
    return next((name for name in names if name not in (*SUPERVISORS, *FIRST)), None)


def has_steps(folder: Path) -> bool:
    """Whether a run got anywhere: metrics, checkpoints or a final model are there."""
    metrics = folder / "metrics.jsonl"
    return (
        (folder / "final.json").exists()
        or (metrics.exists() and metrics.stat().st_size > 0)
        or any((folder / "checkpoints").glob("step_*"))
    )


def clear(folder: Path) -> None:
    """Remove what kitae wrote, run.json last, so that a kill in between leaves something that is still a run.

    Files that are not ours stay. The lock stays too: it is held.
    """
    final = read_json(folder / "final.json") or {}
    remove(folder, [*final.get("files", []), *(name for name in OURS if name not in ("run.json", "lock"))])
    remove(folder, [path.name for made in (".tmp-*", "nonfinite-rank*.json") for path in folder.glob(made)])
    remove(folder, ["run.json"])


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files and folders by name; those that are not there are passed over."""
    for name in names:
        path = folder / Path(name).name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def publish(aside: Path, *, step: int, is_best: bool) -> None:
    """Move the final model's files from `aside` to the top of the run directory around it.

    final.json lists them before the first is moved: what it lists is ours to replace, whenever a kill strikes.
    config.json goes last, so that nothing loads from there before all of it is there.
    """
    sync_tree(aside)
    folder = aside.parent
    names = sorted(os.listdir(aside), key=lambda name: (name == "config.json", name))
    clashing = sorted(set(names) & {*OURS, *SUPERVISORS})
    assert not clashing, f"the final model has files that belong to the run: {clashing}"
    earlier = (read_json(folder / "final.json") or {}).get("files", [])
    final = {"step": step, "source": "best" if is_best else "last"}
    write_json(folder / "final.json", {**final, "files": sorted({*names, *earlier})})
    remove(folder, set(earlier) - set(names))
    for name in names:
        if (aside / name).is_dir():
            remove(folder, [name])
        os.rename(aside / name, folder / name)
    aside.rmdir()
    sync_folder(folder)
    write_json(folder / "final.json", {**final, "files": sorted(names)})


def _require_other_model(folder: Path, model: str | None) -> None:
    if (
        model is not None
        and Path(model).exists()
        and folder.resolve() in (Path(model).resolve(), *Path(model).resolve().parents)
    ):
        raise ConfigError(
            f"overwrite would remove the model to be trained: model.name_or_path {model} lies in output_dir {folder}; "
            "choose another output_dir"
        )


def _unusable(folder: Path, error: OSError | RuntimeError) -> RunDirError:
    if isinstance(error, OSError):
        return RunDirError(f"output_dir: {explain(error, folder)}")
    return RunDirError(f"output_dir {folder}: {error}")


def leave_pointer(folder: Path, *, recipe: str) -> None:
    """A small file in $KITAE_HOME/runs by which consoles find runs started anywhere; a run goes on without it."""
    try:
        where = home() / "runs" / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
        where.parent.mkdir(parents=True, exist_ok=True)
        pointer: dict[str, Any] = {"path": str(folder), "recipe": recipe, "started": round(time.time(), 3)}
        write_json(where, pointer, is_durable=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory can be found
        logger.info(
            "the run is not listed in ~/.kitae (%s); set KITAE_HOME to a folder that can be written", error
        )
