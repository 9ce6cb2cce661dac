"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases where asked for.

log(step, metrics) -> means since the last line -> {"step": 10, "time": ..., "train/loss": ...} -> every writer

Names are group/name and explained in docs/metrics.md. After a resume every writer goes on behind the checkpoint's
step: lines after it are cut off, and TensorBoard is told to forget its points.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from kitae.config import LogSettings
from kitae.errors import ConfigError, MissingExtraError
from kitae.train.files import JsonLines, disk_errors

logger = logging.getLogger(__name__)

WANDB_TIMEOUT_S = 60
"""How long Weights & Biases may take to start; without a network it never would."""
LATEST = (
    "train/learning_rate",
    "train/critic_learning_rate",
    "train/kl_coef",
    "rollout/temperature",
)
"""Metrics of which a line shows the latest value; of all others it shows the mean since the last line."""


class Window:
    """The values of each metric since the last line; part of every checkpoint."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(float(value))

    def take(self) -> dict[str, float]:
        """One value per metric, and an empty window."""
        line = {
            name: values[-1] if name in LATEST or len(values) == 1 else sum(values) / len(values)
            for name, values in self._values.items()
        }
        self._values = {}
        return line

    def state(self) -> dict[str, Any]:
        return {"values": self._values}

    def load_state(self, state: dict[str, Any]) -> None:
        self._values = {name: list(values) for name, values in state["values"].items()}


class Writer(Protocol):
    """Where metric lines go besides metrics.jsonl."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def resume(self, step: int) -> None:
        """The run goes on behind `step`; whatever was written after it no longer counts."""

    def sync(self) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """metrics.jsonl and the writers beside it. Only rank 0 has one."""

    def __init__(self, folder: Path, writers: list[Writer]) -> None:
        self._lines = JsonLines(folder / "metrics.jsonl")
        self._writers = writers

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._lines.append({"step": step, "time": round(time.time(), 3), **metrics})
        for writer in self._writers:
            writer.write(step, metrics)

    def sync(self) -> int:
        """Make everything durable; the size of metrics.jsonl, to come back to with resume()."""
        for writer in self._writers:
            writer.sync()
        return self._lines.sync()

    def resume(self, step: int, *, size: int) -> None:
        self._lines.cut(size)
        for writer in self._writers:
            writer.resume(step)

    def close(self) -> None:
        self._lines.close()
        for writer in self._writers:
            writer.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in the order of steps."""
    with (Path(folder) / "metrics.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class TensorBoardWriter:
    """Event files that TensorBoard reads, written by its own record writer in this thread.

    No thread and no queue: an error shows where it happens, and what was logged before a checkpoint is on the disk
    when the checkpoint is. Files are numbered upwards, so that a clock set back does not put a resumed run first.
    """

    def __init__(self, folder: Path) -> None:
        self._new_event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        record_writer = importlib.import_module("tensorboard.summary.writer.record_writer").RecordWriter
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            numbers = [
                int(m[1]) for m in (re.search(r"tfevents\.(\d+)\.", p.name) for p in folder.iterdir()) if m
            ]
            number = max([int(time.time()), *(n + 1 for n in numbers)])
            self._path = folder / f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
            self._file = self._path.open("xb")
        self._records = record_writer(self._file)
        self._write(self._new_event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        event = self._new_event(wall_time=time.time(), step=step)
        for name, value in metrics.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._write(event)

    def resume(self, step: int) -> None:
        event = self._new_event(wall_time=time.time(), step=step + 1)
        event.session_log.status = event.session_log.START
        self._write(event)

    def sync(self) -> None:
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with disk_errors(self._path):
            self._file.close()

    def _write(self, event: Any) -> None:  # Any: the protobuf class has no types
        with disk_errors(self._path):
            self._records.write(event.SerializeToString())
            self._file.flush()


class WandbWriter:
    """Weights & Biases; without a login it writes offline files that `wandb sync` uploads later.

    Where it cannot start, the run does not either; what fails later is said once and costs the run nothing.
    """

    def __init__(
        self, folder: Path, *, settings: LogSettings, name: str, run_id: str, config: dict[str, Any]
    ) -> None:
        self._is_broken = False
        try:
            wandb = importlib.import_module("wandb")
            is_offline = "WANDB_MODE" not in os.environ and not wandb.api.api_key
            if is_offline:
                logger.warning(
                    "no Weights & Biases login found: writing offline, upload later with `wandb sync`"
                )
            self._run = wandb.init(
                project=settings.wandb_project,
                name=name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=config,
                mode="offline" if is_offline else None,
                settings={"init_timeout": WANDB_TIMEOUT_S},
            )
        except Exception as error:
            # Its own errors and those of the libraries it uses have no common base.
            raise ConfigError(
                f"log.report_to names wandb, which cannot start ({_first_line(error)}); set the environment variable "
                "WANDB_MODE=offline and upload later with `wandb sync`, or leave wandb out of log.report_to"
            ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda: self._run.log(dict(metrics), step=step))

    def resume(self, step: int) -> None:
        """Nothing to do: W&B refuses points of steps it already has."""

    def sync(self) -> None:
        """Nothing to do: W&B writes by itself."""

    def close(self) -> None:
        self._try(self._run.finish)

    def _try(self, report: Callable[[], object]) -> None:
        try:
            report()
        except Exception as error:  # whatever it is, the run is worth more than its report
            if not self._is_broken:
                self._is_broken = True
                logger.warning(
                    "Weights & Biases does not take the metrics (%s); metrics.jsonl in the run's folder has them all",
                    _first_line(error),
                )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require_writers(settings: LogSettings) -> None:
    """Refuse a report_to whose package is missing, before any weights are read."""
    if "wandb" in settings.report_to and importlib.util.find_spec("wandb") is None:
        raise MissingExtraError(
            "log.report_to names wandb, which is not installed: pip install 'kitae[wandb]', or report_to tensorboard"
        )


def open_metrics(
    folder: Path, *, settings: LogSettings, name: str, run_id: str, config: dict[str, Any]
) -> Metrics:
    """metrics.jsonl of a run folder, and the writers that log.report_to names."""
    writers: list[Writer] = []
    if "tensorboard" in settings.report_to:
        where = settings.tensorboard_dir
        writers.append(TensorBoardWriter(Path(where) if where is not None else folder / "tensorboard"))
    if "wandb" in settings.report_to:
        writers.append(WandbWriter(folder, settings=settings, name=name, run_id=run_id, config=config))
    return Metrics(folder, writers)
