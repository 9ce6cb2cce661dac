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
    first = server.start(folder, seconds_per_step=0.5)
    while not (folder / "status.json").exists():
        time.sleep(0.01)
    for way in ({}, {"resume": True}, {"overwrite": True}):
        began = time.monotonic()
        second = server.run(folder, **way)
        assert second.code == 75
        assert time.monotonic() - began < 2
        text = second.text()
        assert f"in use by process {first.pid} on {os.uname().nodename}, started 20" in text
        assert len(text.strip().splitlines()) == 1
    first.signal(signal.SIGKILL)
    first.wait()
    assert server.run(folder, resume=True).code == 0


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock")
    with pytest.raises(LockedError):
        Lock(tmp_path / "lock")
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.read(reader, 1)
        os._exit(0)
    lock.release()
    Lock(tmp_path / "lock").release()
    os.write(writer, b"x")
    os.waitpid(worker, 0)
