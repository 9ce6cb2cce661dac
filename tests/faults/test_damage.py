"""A checkpoint that lost a bit, a byte or a file is named and skipped; without a whole one the run refuses to start."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from fault_outcome import numbers, weights
from fault_server import Server

from kitae.errors import CheckpointError
from kitae.parallel.world import World
from kitae.train.checkpoint import load_newest, read, save, steps_in

FILES = ["manifest.json", "rank_000.json", "rank_000.safetensors"]
OPTIONS = {"total": 9, "save": {"steps": 3, "keep": 3}}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint of step 2 beside one of step 1."""
    for step in (1, 2):
        state = {"weights": torch.arange(24.0) + step, "note": "text", "nested": {"list": [1.5, None, True]}}
        save(tmp_path, step=step, state=state, identity={"settings": {"seed": 3}}, world=World())
    return tmp_path / "step_000002"


def flip(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    place = int(position * (len(data) - 1))
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)


def truncate(path: Path, position: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(position * (len(data) - 1))])


def append(path: Path, position: float) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * (1 + int(position * 50)))


def blank(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    start = int(position * (len(data) - 1))
    data[start : start + 16] = bytes(b ^ 0xFF for b in data[start : start + 16])
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, truncate, append, blank])
@pytest.mark.parametrize("name", FILES)
def test_damage_anywhere_is_noticed_and_the_older_one_is_used(whole: Path, name: str, damage) -> None:
    original = (whole / name).read_bytes()
    for position in [0.0, 1.0, *(random.Random(name).random() for _ in range(38))]:
        damage(whole / name, position)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            read(whole, rank=0)
        loaded, skipped = load_newest(whole.parent, world=World())
        assert loaded is not None and loaded.step == 1
        assert loaded.state["weights"].tolist() == [float(n + 1) for n in range(24)]
        assert len(skipped) == 1 and skipped[0].startswith("step_000002: ")
        (whole / name).write_bytes(original)
    assert read(whole, rank=0).step == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", ["missing", "empty", "a folder"])
def test_a_file_that_is_gone_is_noticed(whole: Path, name: str, way: str) -> None:
    (whole / name).unlink()
    if way == "empty":
        (whole / name).touch()
    if way == "a folder":
        (whole / name).mkdir()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read(whole, rank=0)


def test_no_whole_checkpoint_is_an_error_that_names_each(whole: Path) -> None:
    for step in (1, 2):
        flip(whole.parent / f"step_00000{step}" / "rank_000.json", 0.5)
    with pytest.raises(CheckpointError, match=r"step_000002: .*step_000001: .*--overwrite"):
        load_newest(whole.parent, world=World())


def test_a_run_goes_on_from_the_older_checkpoint_exactly(server: Server, undisturbed, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert server.run(folder, raise_at=8, **OPTIONS).code == 1
    flip(folder / "checkpoints" / "step_000006" / "rank_000.safetensors", 0.7)
    life = server.run(folder, resume=True, **OPTIONS)
    assert life.code == 0
    assert "skipped a damaged checkpoint: step_000006: rank_000.safetensors is damaged" in life.text()
    assert (numbers(folder), weights(folder)) == undisturbed(**OPTIONS)
    assert steps_in(folder / "checkpoints") == [9, 6, 3]
    assert (folder / "checkpoints" / "damaged-step_000006").is_dir()


def test_a_run_without_a_whole_checkpoint_never_starts_from_the_beginning(
    server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert server.run(folder, raise_at=5, **OPTIONS).code == 1
    before = (folder / "metrics.jsonl").read_text()
    truncate(folder / "checkpoints" / "step_000003" / "manifest.json", 0.5)
    life = server.run(folder, resume=True, **OPTIONS)
    assert life.code == 2
    assert "no whole checkpoint" in life.text() and "step_000003: manifest.json" in life.text()
    shutil.rmtree(folder / "checkpoints")
    life = server.run(folder, resume=True, **OPTIONS)
    assert life.code == 2
    assert "says that step 3 was saved" in life.text()
    assert (folder / "metrics.jsonl").read_text() == before
