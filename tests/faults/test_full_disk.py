"""A disk that is too small or becomes full: exit 2, the last good checkpoint stays, and space lets the run go on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_outcome import numbers, weights
from fault_server import Server

from kitae.train.checkpoint import steps_in

OPTIONS = {"total": 10, "width": 1024, "save": {"steps": 2, "keep": 1}}  # one checkpoint: about 390 KiB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, *, leave: int) -> None:
    """Take all but `leave` bytes."""
    size = max(shutil.disk_usage(folder).free - leave, 0)
    with (folder / "ballast").open("wb") as file:
        file.write(b"\0" * size)


def test_a_disk_too_small_is_refused_before_the_first_step(server: Server, small_disk: Path) -> None:
    fill(small_disk, leave=250_000)
    life = server.run(small_disk / "run", **OPTIONS)
    assert life.code == 2
    assert "disk too small: need" in life.text()
    assert not (small_disk / "run" / "checkpoints").exists()


def test_a_disk_too_small_for_the_optimizers_moments_is_refused_after_the_first_step(
    server: Server, small_disk: Path
) -> None:
    fill(small_disk, leave=600_000)
    life = server.run(small_disk / "run", **{**OPTIONS, "save": {"steps": 0}})
    assert life.code == 2
    assert "disk too small: need" in life.text()
    assert not (small_disk / "run" / "checkpoints").exists()
    assert numbers(small_disk / "run") == []


def test_known_growth_is_refused_before_the_first_step(server: Server, small_disk: Path) -> None:
    life = server.run(small_disk / "run", grows_by=2_000_000, raise_at=1, **OPTIONS)
    assert life.code == 2, "it took a step"
    assert "disk too small: need 4.5 MiB for checkpoints, have 4.0 MiB" in life.text()
    assert not (small_disk / "run" / "checkpoints").exists()


def test_a_resume_needs_room_for_one_checkpoint_beside_the_one_it_has(
    server: Server, small_disk: Path
) -> None:
    folder = small_disk / "run"
    life = server.run(folder, **OPTIONS, raise_at=5)
    assert life.code == 1 and steps_in(folder / "checkpoints") == [4]
    fill(small_disk, leave=600_000)
    life = server.run(folder, resume=True, **OPTIONS)
    assert life.code == 0, life.text()


@pytest.mark.parametrize("left", [0, 50_000, 300_000])
def test_a_disk_that_fills_up_costs_nothing(
    server: Server, undisturbed, small_disk: Path, tmp_path: Path, left: int
) -> None:
    folder, held = small_disk / "run", tmp_path / "held"
    life = server.start(folder, **OPTIONS, hold=["step", 3, str(held)])
    life.wait_until(held.exists)
    assert steps_in(folder / "checkpoints") == [2]
    fill(small_disk, leave=left)
    held.unlink()
    assert life.wait() == 2
    assert "disk full: " in life.text() and "have" in life.text()
    assert "Traceback" not in life.text()
    assert steps_in(folder / "checkpoints")
    (small_disk / "ballast").unlink()
    assert server.run(folder, resume=True, **OPTIONS).code == 0
    assert (numbers(folder), weights(folder)) == undisturbed(**OPTIONS)
