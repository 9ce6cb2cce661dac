"""A kill, a full disk, or an input/output error at the N-th file system call of a run, for N over all of it.

strace attaches to a life that waits, and injects the fault. The calls are spread evenly; a nightly run may take all
by KITAE_SYSCALL_POINTS=1000.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from fault_outcome import numbers, weights
from fault_server import Life, Server

from kitae.train.checkpoint import steps_in

CALLS = "write,fsync,ftruncate,rename,mkdir,unlink,unlinkat,rmdir"
OPTIONS = {"total": 4, "save": {"steps": 2, "keep": 1}, "log": {"report_to": ["none"]}}
POINTS = int(os.environ.get("KITAE_SYSCALL_POINTS", "16"))


MAY_FAIL = re.compile(r"lives\d*/life_|pipe:|resources\.jsonl|train\.log|/home|checkpoints\", 0777")
"""What a run goes on without: its terminal, resources.jsonl, train.log, its pointer, making a folder that is there."""


@pytest.fixture(scope="module", autouse=True)
def _strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode != 0:
        pytest.skip("strace may not trace processes here")


def traced(server: Server, folder: Path, log: Path, *injection: str) -> Life:
    """A life under strace, to its end."""
    life = server.start(folder, is_stopped=True, resume=True, **OPTIONS)
    command = ["strace", "-f", "-q", "-y", "-o", str(log), "-p", str(life.pid), "-e", f"trace={CALLS}"]
    tracer = subprocess.Popen([*command, *injection], stderr=subprocess.DEVNULL)
    while "TracerPid:\t0" in Path(f"/proc/{life.pid}/status").read_text():
        assert tracer.poll() is None, "strace could not attach"
        time.sleep(0.002)
    life.signal(signal.SIGCONT)
    life.wait()
    tracer.wait(timeout=120)
    return life


@pytest.fixture(scope="module")
def points(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """Every file system call of an undisturbed life: its name and its number among those of that name."""
    folder = tmp_path_factory.mktemp("traced")
    assert traced(server, folder / "run", folder / "log").code == 0
    calls = re.findall(r"^\d+ +(\w+)\(", (folder / "log").read_text(), flags=re.MULTILINE)
    seen: Counter[str] = Counter()
    found = []
    for call in calls:
        seen[call] += 1
        found.append((call, seen[call]))
    assert {"write", "fsync", "rename", "mkdir"} <= set(seen), seen
    return found


def spread(points: list[tuple[str, int]]) -> list[tuple[str, int]]:
    step = max(len(points) / POINTS, 1)
    return [points[int(i * step)] for i in range(min(POINTS, len(points)))]


def assert_resume_is_exact(server: Server, folder: Path, expected: tuple, where: str) -> None:
    life = server.run(folder, resume=True, **OPTIONS)
    assert life.code == 0, f"{where}: {life.text()}"
    assert (numbers(folder), weights(folder)) == expected, where


def test_a_kill_at_any_call_loses_nothing(server: Server, undisturbed, points, tmp_path: Path) -> None:
    expected = undisturbed(**OPTIONS)
    for call, number in spread(points):
        where, folder = f"killed at {call} {number}", tmp_path / f"{call}_{number}"
        life = traced(server, folder, tmp_path / "log", "-e", f"inject={call}:signal=KILL:when={number}")
        assert life.code in (-9, 0), where  # 0: a thread made one call fewer this time
        checkpoints = folder / "checkpoints"
        if (checkpoints / ".tmp-step_000004").exists():
            assert 2 in steps_in(checkpoints), where
        assert_resume_is_exact(server, folder, expected, where)
        shutil.rmtree(folder)


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_an_error_at_any_call_is_reported_and_loses_nothing(
    server: Server, undisturbed, points, tmp_path: Path, error: str
) -> None:
    expected = undisturbed(**OPTIONS)
    failing = [point for point in points if point[0] in ("write", "fsync", "rename", "mkdir", "ftruncate")]
    for call, number in spread(failing):
        where, folder = f"{error} at {call} {number}", tmp_path / f"{call}_{number}"
        log = tmp_path / "log"
        life = traced(server, folder, log, "-e", f"inject={call}:error={error}:when={number}")
        injected = next((line for line in log.read_text().splitlines() if "INJECTED" in line), "")
        if injected and not MAY_FAIL.search(injected):
            assert life.code == 2, f"{where}: {life.code} {injected} {life.text()}"
            assert "kitae: error: " in life.text(), where
        assert "Traceback" not in life.text(), f"{where}: {life.text()}"
        assert_resume_is_exact(server, folder, expected, where)
        shutil.rmtree(folder)
