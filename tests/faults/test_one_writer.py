"""Two processes never write into one run directory."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from fault_server import Server

from kitae.errors import LockedError
from kitae.train.folder import Lock


def test_a_second_run_is_refused_and_names_the_first(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    held = tmp_path / "held"
    first = server.start(folder, hold=["step", 1, str(held)])
    first.wait_until(held.exists)
    for way in ({}, {"resume": True}, {"overwrite": True}):
        began = time.monotonic()
        second = server.run(folder, **way)
        assert second.code == 75
        assert time.monotonic() - began < 20
        text = second.text()
        assert f"in use by process {first.pid} on {os.uname().nodename}, started 20" in text
        assert len(text.strip().splitlines()) == 1
    first.signal(signal.SIGKILL)
    first.wait()
    assert server.run(folder, resume=True).code == 0


def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_run(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    run = os.fork()
    if run == 0:
        Lock(tmp_path / "lock")
        worker = os.fork()
        if worker == 0:
            os.write(writer, str(os.getpid()).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(reader, 20))
    try:
        with pytest.raises(LockedError, match=f"process {run} "):
            Lock(tmp_path / "lock")
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        Lock(tmp_path / "lock").release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    first = Lock(tmp_path / "lock")
    first.release()
    second = Lock(tmp_path / "lock")
    with pytest.raises(LockedError):
        Lock(tmp_path / "lock")
    second.release()
