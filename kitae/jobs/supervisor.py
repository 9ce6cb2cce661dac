"""One job, one supervisor: a small process of its own session that outlives the terminal and writes down how the job ended.

    start() --lock on `alive`, inherited--> supervisor --the same lock--> the command and everything it starts

The lock is the liveness: the kernel gives it back when the last process of the job is gone, so a process id that was
used again cannot be mistaken for the job, and nothing has to beat. kitae.jobs.job reads the folder:

    job.json         what was started: the command, its working directory, when
    supervisor.json  the command's process id and when it began
    output.log       what the command prints
    stop.json        somebody asked the job to end; the time it is given for that
    ended.json       exit code, and whether it was asked to

Run as `python -m kitae.jobs.supervisor FOLDER`. Standard library only: it stays small next to a model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 0.2
ASKING_S = 0.2
"""Longer than anybody who only asks whether a file is locked holds its lock."""
LOG_LIMIT = 200 * 2**20
"""Bytes of output.log after which its older part goes to output.log.1."""


def main() -> int:
    """Run the command of the folder named by the first argument, to its end."""
    folder, lock = Path(sys.argv[1]), int(sys.argv[2])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    watching = lock_file(folder / "watching")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: request_stop(folder, grace_s=job["grace_s"]))
    with (folder / "output.log").open("ab", buffering=0) as log:
        try:
            child = subprocess.Popen(
                job["command"],
                cwd=job["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"{job['command'][0]} cannot be started: {error}\n".encode())
            put(folder / "ended.json", {"code": 127, "time": time.time(), "stopped": False})
            return 0
    put(folder / "supervisor.json", {"pid": child.pid, "began": began(child.pid), "started": time.time()})
    code = _wait(child, folder)
    _kill_group(child.pid)  # workers that the command left behind
    put(
        folder / "ended.json", {"code": code, "time": time.time(), "stopped": (folder / "stop.json").exists()}
    )
    os.close(watching)
    os.close(lock)  # held to here: a job whose lock is free has ended.json, unless its supervisor was killed
    return 0


def _wait(child: subprocess.Popen[bytes], folder: Path) -> int:
    """Wait for the end; asked to stop, first ask the command, then end it."""
    deadline = None
    while True:
        try:
            return child.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            if deadline is None and (stop := read(folder / "stop.json")) is not None:
                deadline = time.monotonic() + stop["grace_s"]
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGTERM)
            elif deadline is not None and time.monotonic() > deadline:
                _kill_group(child.pid)
            _shorten(folder / "output.log")


def request_stop(folder: Path, *, grace_s: float) -> None:
    """Ask the job of a folder to end: SIGTERM to all of it, SIGKILL to what is left after `grace_s` seconds."""
    if not (folder / "stop.json").exists():
        put(folder / "stop.json", {"grace_s": grace_s, "time": time.time()})


def _shorten(log: Path) -> None:
    """Move what a long-running command printed to a second file; it goes on writing at the end of the emptied first."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_LIMIT:
            copied = log.with_name(log.name + ".1")
            copied.write_bytes(log.read_bytes()[-LOG_LIMIT:])
            os.truncate(log, 0)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def lock_file(path: Path) -> int:
    """A descriptor that holds the lock on a file; BlockingIOError when somebody else does for longer than to ask."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + ASKING_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise
            time.sleep(ASKING_S / 20)
        except OSError:
            os.close(descriptor)
            raise
        else:
            return descriptor


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file. Asking takes a shared lock, so several may ask at the same time."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def began(pid: int) -> str | None:
    """When a process began, in words of the system, which with its id names it for good; None when there is none."""
    try:
        after_name = (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
        )
        return after_name.split()[19]  # field 22 of proc(5): clock ticks since boot
    except OSError:
        asked = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        return asked.stdout.strip() or None


def put(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees all of it or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file's content; None when it is not there."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


if __name__ == "__main__":
    sys.exit(main())
