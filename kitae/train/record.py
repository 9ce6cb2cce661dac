"""What a run writes about itself beside its checkpoints; only rank 0 has one.

run.json      what this run is and the settings it finally used   status.json   where it is now, replaced every second
metrics.jsonl numbers, step by step                               exit.json     how it ended
events.jsonl  what happened and when, resumes included            samples.jsonl completions with rewards and reasons
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import kitae
from kitae.config import LogSettings
from kitae.errors import RunDirError
from kitae.train.files import JsonLines, disk_errors, read_json, write_json
from kitae.train.identity import versions
from kitae.train.metrics import open_metrics
from kitae.train.resources import ResourceMonitor


class Record:
    """The files of one run directory that other programs read."""

    def __init__(
        self, folder: Path, *, settings: Mapping[str, Any], recipe: str, log: LogSettings, resume: bool
    ) -> None:
        self.folder = folder
        described = (read_json(folder / "run.json") or {}) if resume else {}
        self._run: dict[str, Any] = {
            "kitae_version": kitae.__version__,
            "run_id": described.get("run_id") or uuid.uuid4().hex[:12],
            "name": log.run_name or folder.name,
            "recipe": recipe,
            "started": described.get("started") or round(time.time(), 3),
            "settings": dict(settings),
            "machine": {},
            "facts": {},
            "versions": versions(),
            "inexact": list(described.get("inexact", [])),
        }
        with disk_errors(folder):
            (folder / "exit.json").unlink(missing_ok=True)
            if not described:  # a resume may still be refused; until then run.json is that of the run so far
                write_json(folder / "run.json", self._run)
        self._events = JsonLines(folder / "events.jsonl")
        self._samples = JsonLines(folder / "samples.jsonl")
        self.metrics = open_metrics(
            folder,
            settings=log,
            name=self._run["name"],
            run_id=self._run["run_id"],
            config=self._run["settings"],
        )
        self._resources = ResourceMonitor(folder / "resources.jsonl")

    def describe(
        self, *, machine: Mapping[str, Any], facts: Mapping[str, Any], inexact: Iterable[str] = ()
    ) -> None:
        """Add to run.json what became known since; `inexact` are reasons why the run is no exact continuation."""
        self._run |= {
            "machine": dict(machine),
            "facts": dict(facts),
            "inexact": [*self._run["inexact"], *inexact],
        }
        with disk_errors(self.folder):
            write_json(self.folder / "run.json", self._run)

    def status(self, state: str, **fields: Any) -> None:
        """Replace status.json. Fields are JSON values."""
        status = {
            "state": state,
            **fields,
            "updated": round(time.time(), 3),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "inexact": bool(self._run["inexact"]),
        }
        with disk_errors(self.folder):
            write_json(self.folder / "status.json", status, is_durable=state not in ("starting", "running"))

    def event(self, kind: str, **fields: Any) -> None:
        self._events.append({"time": round(time.time(), 3), "event": kind, **fields})

    def health_notes(self, *, since: int) -> set[tuple[str, int]]:
        """Rule and step of the health notes that events.jsonl has of this step and later ones."""
        with disk_errors(self.folder):
            lines = (self.folder / "events.jsonl").read_bytes().splitlines()
        found = set()
        for line in lines:
            if b'"health"' in line:
                # A line that a broken disk spoilt stops no resume; its note may then be said twice.
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if event["event"] == "health" and event["step"] >= since:
                        found.add((event["rule"], event["step"]))
        return found

    def samples(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._samples.append(*records)

    def sync(self) -> dict[str, int]:
        """Make metrics and samples durable; their sizes, for a checkpoint to come back to."""
        return {"metrics": self.metrics.sync(), "samples": self._samples.sync()}

    def cut(self, step: int, sizes: Mapping[str, int]) -> None:
        """Drop metrics and samples after a checkpoint's step. Events stay: they are history."""
        self.metrics.resume(step, size=sizes["metrics"])
        self._samples.cut(sizes["samples"])

    def close(self) -> list[str]:
        """Close all files; what went wrong in that is returned, so that every one of them is closed."""
        problems = []
        for thing in (self._resources, self.metrics, self._events, self._samples):
            try:
                thing.close()
            except RunDirError as error:
                problems.append(str(error))
        return problems


def write_exit(folder: Path, code: int, reason: str, *, step: int) -> None:
    """exit.json: the run ended, why, and with which exit code."""
    path = folder / "exit.json"
    with disk_errors(path):
        write_json(path, {"code": code, "reason": reason, "step": step, "time": round(time.time(), 3)})
