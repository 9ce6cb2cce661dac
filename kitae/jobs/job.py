"""A job as a folder: start it, what state it is in, stop it. Nothing is kept in memory; every program sees the same."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitae.errors import LockedError, RunDirError
from kitae.jobs import supervisor

POLL_S = 0.1
PATIENCE_S = 10.0
"""How long after its time a job may still need to be gone."""
ENDED = ("stopped", "failed", "lost")


@dataclass(frozen=True, slots=True)
class Job:
    """A command that runs under a supervisor of its own, and the folder where both write."""

    folder: Path

    @classmethod
    def start(
        cls, folder: Path, command: Sequence[str], *, grace_s: float, facts: Mapping[str, Any] | None = None
    ) -> Job:
        """Start a command that outlives this process and its terminal, in a folder that is there and holds no live job.

        `grace_s` is how long it may take to end after it was asked to. `facts` are kept in job.json beside the command.
        """
        job = cls(folder)
        try:
            alive = supervisor.lock_file(folder / "alive")
        except BlockingIOError as error:
            raise LockedError(f"{folder} holds a job that is running; stop it first") from error
        try:
            for left in ("supervisor.json", "stop.json", "ended.json"):  # of a job that has ended
                (folder / left).unlink(missing_ok=True)
            supervisor.put(
                folder / "job.json",
                {
                    **(facts or {}),
                    "command": list(command),
                    "cwd": os.getcwd(),
                    "grace_s": grace_s,
                    "created": time.time(),
                },
            )
            subprocess.Popen(
                [sys.executable, "-m", "kitae.jobs.supervisor", str(folder), str(alive)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(alive,),
                start_new_session=True,
            )
        except OSError as error:
            raise RunDirError(f"a job cannot be started in {folder}: {error.strerror or error}") from error
        finally:
            os.close(alive)  # the supervisor has its own by now
        return job

    def facts(self) -> dict[str, Any]:
        """What it was started as: job.json, {} when it is not there."""
        return supervisor.read(self.folder / "job.json") or {}

    def process(self) -> dict[str, Any] | None:
        """The command's process id and when it was started; None until then."""
        return supervisor.read(self.folder / "supervisor.json")

    def end(self) -> dict[str, Any] | None:
        """Exit code, time, and whether it was asked to end; None while it runs or when it was lost."""
        return supervisor.read(self.folder / "ended.json")

    def is_alive(self) -> bool:
        """Whether anything of it still runs."""
        return supervisor.is_locked(self.folder / "alive")

    def state(self) -> str:
        """creating, running, stopping, stopped, failed, or lost (gone without a trace: the machine went down, say)."""
        is_alive = self.is_alive()  # before the files: a job that ends in between has written them
        end = self.end()
        if end is not None:
            return "stopped" if end["stopped"] or end["code"] == 0 else "failed"
        if not is_alive:
            return "lost"
        if (self.folder / "stop.json").exists():
            return "stopping"
        return "running" if self.process() else "creating"

    def stop(self, *, grace_s: float | None = None) -> str:
        """End it, wait until nothing of it runs, and return its state. A job that has ended is left alone."""
        if self.state() in ENDED:
            return self.state()
        grace_s = self.facts().get("grace_s", 10.0) if grace_s is None else grace_s
        supervisor.request_stop(self.folder, grace_s=grace_s)
        asked, deadline = False, time.monotonic() + grace_s
        while self.is_alive():
            if self.end() is None and self.process() and not supervisor.is_locked(self.folder / "watching"):
                # The supervisor was killed.
                if not asked or time.monotonic() > deadline:
                    self._signal(signal.SIGKILL if asked else signal.SIGTERM)
                asked = True
            if time.monotonic() > deadline + PATIENCE_S:
                raise RunDirError(
                    f"something of the job in {self.folder} does not end; see `fuser {self.folder}/alive`"
                )
            time.sleep(POLL_S)
        if self.end() is None:
            supervisor.put(self.folder / "ended.json", {"code": None, "time": time.time(), "stopped": True})
        return self.state()

    def _signal(self, number: signal.Signals) -> None:
        """Signal the command and what it started, if its process id still is its own."""
        process = self.process() or {}
        if supervisor.began(process["pid"]) == process["began"]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process["pid"], number)

    def log_tail(self, lines: int = 20) -> list[str]:
        """The last lines that the command printed."""
        try:
            with (self.folder / "output.log").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 64 * 1024))
                return file.read().decode("utf-8", errors="replace").splitlines()[-lines:]
        except FileNotFoundError:
            return []
