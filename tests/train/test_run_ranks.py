"""Two ranks: one writes, both save their part, both stop together, and both go on exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kitae.errors import CheckpointError
from kitae.parallel.world import World
from kitae.train.checkpoint import steps_in
from kitae.train.metrics import read_metrics
from kitae.train.run import Run


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]], list[str]]:
    """The folder of the runs, how they ended on each rank, and what each rank printed as errors."""
    folder = tmp_path_factory.mktemp("ranks")
    shared = {**os.environ, "WORLD_SIZE": "2", "KITAE_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("run_ranks.py")), str(folder)],
            env={**shared, "RANK": str(rank), "KITAE_HOME": str(folder / "home")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return folder, [json.loads(out.splitlines()[-1]) for out, _ in outputs], [err for _, err in outputs]


def test_both_ranks_end_alike(ended) -> None:
    _, (first, second), _ = ended
    assert first == second
    assert first[0] == first[2] == "finished"
    assert first[1].startswith("143 stopped by SIGTERM after step 3 of 6")
    assert first[3].startswith("2 output_dir") and "already holds a run" in first[3]


def test_only_the_first_rank_writes_and_speaks(ended) -> None:
    folder, _, (_, errors_of_second) = ended
    samples = (folder / "whole" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in samples] == [{"step": step, "rank": 0} for step in range(1, 7)]
    assert [line["step"] for line in read_metrics(folder / "whole")] == [1, 2, 3, 4, 5, 6]
    assert "step" not in errors_of_second


def test_a_run_stopped_on_one_rank_goes_on_exactly(ended) -> None:
    folder, _, _ = ended
    whole, cut = (
        [(m["step"], m["train/loss"]) for m in read_metrics(folder / name)] for name in ("whole", "cut")
    )
    assert cut == whole
    models = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert models[0] == models[1]


def test_every_rank_saves_its_own_files_under_one_manifest(ended) -> None:
    folder, _, _ = ended
    assert steps_in(folder / "cut" / "checkpoints") == [6, 4]
    assert sorted(p.name for p in (folder / "cut" / "checkpoints" / "step_000006").iterdir()) == [
        "manifest.json", "rank_000.json", "rank_000.safetensors", "rank_001.json", "rank_001.safetensors",
    ]  # fmt: skip


def test_another_number_of_ranks_cannot_resume(ended, tmp_path: Path) -> None:
    class Nothing:
        def state(self) -> dict:
            return {}

        def load_state(self, state: dict) -> None: ...

    folder, _, _ = ended
    (folder / "cut" / "status.json").write_text("{}")  # not finished
    with Run.open(
        folder / "cut", config={"train": {"seed": 0}}, world=World(), resume=True, allow_inexact=True
    ) as run:
        run.track("shard", Nothing())
        with pytest.raises(CheckpointError, match="written by 2 processes, one file each"):
            next(iter(run.steps(6)))
