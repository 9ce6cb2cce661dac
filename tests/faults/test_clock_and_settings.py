"""A clock that jumps changes no number, and a resume with other settings, data or machine is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fault_outcome import numbers, weights
from fault_server import Server

OPTIONS = {"total": 9, "save": {"steps": 3, "keep": 3}}
BASE = {
    "lora": {"rank": 0},
    "optim": {"learning_rate": 1e-3, "name": "adamw"},
    "data": {"train": ["a.jsonl"]},
}


def test_the_newest_checkpoint_is_chosen_by_its_step_not_its_date(
    server: Server, undisturbed, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert server.run(folder, raise_at=8, **OPTIONS).code == 1
    os.utime(folder / "checkpoints" / "step_000006", (0, 0))
    life = server.run(folder, resume=True, **OPTIONS)
    assert "resumed at step 6" in life.text()
    assert (numbers(folder), weights(folder)) == undisturbed(**OPTIONS)


@pytest.mark.parametrize("shift", ["-30d", "+10y"])
def test_a_clock_that_jumps_changes_no_number(
    server: Server, undisturbed, tmp_path: Path, shift: str
) -> None:
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed")
    folder = tmp_path / "run"
    assert server.run(folder, raise_at=5, **OPTIONS).code == 1
    options = {"output_dir": str(folder), "resume": True, **OPTIONS}
    code = f"import fault_trainer, torch; torch.set_num_threads(1); fault_trainer.train(**{options!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KITAE_HOME": str(tmp_path / "home")}
    subprocess.run(
        ["faketime", "-f", shift, sys.executable, "-c", code],
        check=True,
        cwd=Path(__file__).parent,
        env=environment,
    )
    assert (numbers(folder), weights(folder)) == undisturbed(**OPTIONS)


@pytest.fixture(scope="module")
def interrupted(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    assert server.run(folder, raise_at=5, config=BASE, **OPTIONS).code == 1
    return folder


CHANGES = [
    ({"seed": 1}, "train.seed 0 -> 1"),
    ({"total": 12}, "train.max_steps 9 -> 12"),
    ({"facts": {"data_hash": "xyz"}}, "facts.data_hash abc -> xyz"),
    ({"facts": {"data_hash": "abc", "template": "t1"}}, "facts.template (absent) -> t1"),
    ({"config": {**BASE, "lora": {"rank": 8}}}, "lora.rank 0 -> 8"),
    ({"config": {**BASE, "lora": {}}}, "lora.rank 0 -> (absent)"),
    (
        {"config": {**BASE, "optim": {**BASE["optim"], "learning_rate": 2e-3}}},
        "optim.learning_rate 0.001 -> 0.002",
    ),
    ({"config": {**BASE, "optim": {**BASE["optim"], "name": "adafactor"}}}, "optim.name adamw -> adafactor"),
    ({"config": {**BASE, "data": {"train": ["b.jsonl"]}}}, "data.train ['a.jsonl'] -> ['b.jsonl']"),
    ({"config": {**BASE, "model": {"dtype": "bfloat16"}}}, "model.dtype (absent) -> bfloat16"),
    ({"config": {**BASE, "train": {"seed": 5, "max_steps": 9}}}, "train.seed 0 -> 5"),
    ({"threads": 2}, "machine.threads 1 -> 2"),
]


def kept_by(folder: Path) -> list[tuple[str, bytes]]:
    """Checkpoints and settings of a run."""
    files = [*folder.glob("checkpoints/*/*"), folder / "run.json"]
    return sorted((path.name, path.read_bytes()) for path in files)


@pytest.mark.parametrize(("change", "text"), CHANGES, ids=[text for _, text in CHANGES])
def test_a_resume_with_another_setting_is_refused_by_name(
    server: Server, interrupted: Path, change: dict, text: str
) -> None:
    options = {"config": BASE, **OPTIONS, **change}
    before = kept_by(interrupted)
    life = server.run(interrupted, resume=True, **options)
    assert life.code == 2
    assert f"(then -> now: {text}" in life.text() and "--allow_inexact" in life.text()
    assert kept_by(interrupted) == before


def test_where_and_what_is_written_may_change(server: Server, interrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(interrupted, folder)
    config = {**BASE, "output_dir": "elsewhere", "resume": True, "save": {"keep": 7}, "log": {"steps": 2}}
    assert server.run(folder, resume=True, config=config, **OPTIONS).code == 0


def test_allow_inexact_goes_on_and_marks_the_run(server: Server, interrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(interrupted, folder)
    options = {"config": BASE, **OPTIONS, "total": 12}
    life = server.run(folder, resume=True, allow_inexact=True, **options)
    assert life.code == 0
    assert "resuming inexactly at step 3 (then -> now: train.max_steps 9 -> 12)" in life.text()
    assert [line[0] for line in numbers(folder)] == list(range(1, 13))
    assert json.loads((folder / "run.json").read_text())["inexact"] == ["step 3: train.max_steps 9 -> 12"]
    assert json.loads((folder / "status.json").read_text())["inexact"] is True
