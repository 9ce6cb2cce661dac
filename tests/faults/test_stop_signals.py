"""SIGTERM, SIGINT, SIGHUP: the step ends, everything is saved, and the resumed run is the same to the last bit."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from fault_outcome import numbers, weights
from fault_server import Life, Server

from kitae.train.checkpoint import read, steps_in

OPTIONS = {"total": 12, "save": {"steps": 5}, "evaluation": {"steps": 4}, "seconds_per_step": 0.03}


def wait_for_step(folder: Path, step: int, life: Life) -> None:
    """Until that step is in the metrics."""
    metrics = folder / "metrics.jsonl"
    while life.poll() is None and not (metrics.exists() and f'{{"step": {step},' in metrics.read_text()):
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_says_how_to_resume(
    server: Server, undisturbed, tmp_path: Path, number: int, code: int
) -> None:
    folder, held = tmp_path / "run", tmp_path / "held"
    life = server.start(folder, **OPTIONS, hold=["step", 7, str(held)])
    life.wait_until(held.exists)
    life.signal(number)
    held.unlink()
    assert life.wait() == code
    assert numbers(folder)[-1][0] == 7
    assert steps_in(folder / "checkpoints")[0] == 7
    assert "run the same command with --resume" in life.text()
    assert "Traceback" not in life.text()
    assert json.loads((folder / "exit.json").read_text())["code"] == code
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    assert server.run(folder, resume=True, **OPTIONS).code == 0
    assert (numbers(folder), weights(folder)) == undisturbed(**OPTIONS)
    assert json.loads((folder / "exit.json").read_text())["code"] == 0


def test_signals_at_random_times_lose_nothing(server: Server, undisturbed, tmp_path: Path) -> None:
    rng, stops = random.Random(3), 0
    for number in range(20):  # a busy machine may be too late for a run
        folder, code = tmp_path / f"run_{number}", 143
        while code != 0:
            taken = numbers(folder)[-1][0] if folder.exists() else 0
            life = server.start(folder, resume=True, **OPTIONS)
            wait_for_step(folder, taken + 1, life)
            time.sleep(rng.uniform(0.0, 0.1))
            life.signal(signal.SIGTERM)
            code = life.wait()
            assert code in (0, 143), life.text()
            stops += code == 143
        assert (numbers(folder), weights(folder)) == undisturbed(**OPTIONS)
        if stops >= 2:
            break
    assert stops >= 2


def test_an_evaluation_that_was_due_is_made_up_for(server: Server, undisturbed, tmp_path: Path) -> None:
    folder, held = tmp_path / "run", tmp_path / "held"
    life = server.start(folder, **OPTIONS, hold=["step", 4, str(held)])
    life.wait_until(held.exists)
    life.signal(signal.SIGTERM)  # in step 4, after which an evaluation is due
    held.unlink()
    assert life.wait() == 143
    assert numbers(folder)[-1][0] == 3
    assert read(folder / "checkpoints" / "step_000004", rank=0).state["run"]["owes_evaluation"]
    assert server.run(folder, resume=True, **OPTIONS).code == 0
    assert (numbers(folder), weights(folder)) == undisturbed(**OPTIONS)


@pytest.mark.parametrize(("place", "step"), [("step", 5), ("save", 6)])
def test_a_second_signal_leaves_at_once(
    server: Server, undisturbed, tmp_path: Path, place: str, step: int
) -> None:
    """It waits in a step or a save that would not end by itself."""
    folder, held = tmp_path / "run", tmp_path / "held"
    options = {**OPTIONS, "save": {"steps": 2}}
    assert server.run(folder, **options, raise_at=5).code == 1
    life = server.start(folder, **options, hold=[place, step, str(held)], resume=True)
    life.wait_until(held.exists)
    life.signal(signal.SIGINT)
    life.wait_until(lambda: "finishing this step, then saving" in life.text())
    life.signal(signal.SIGINT)
    assert life.wait() == 130
    assert "leaving at once" in life.text()
    assert server.run(folder, resume=True, **options).code == 0
    assert (numbers(folder), weights(folder)) == undisturbed(**options)


def test_a_signal_in_a_save_lets_it_finish(server: Server, undisturbed, tmp_path: Path) -> None:
    folder, held = tmp_path / "run", tmp_path / "held"
    options = {**OPTIONS, "total": 4, "save": {"steps": 2}}
    life = server.start(folder, **options, hold=["save", 2, str(held)])
    life.wait_until(held.exists)
    life.signal(signal.SIGTERM)
    held.unlink()
    assert life.wait() == 143
    assert steps_in(folder / "checkpoints") == [2]
    assert server.run(folder, resume=True, **options).code == 0
    assert (numbers(folder), weights(folder)) == undisturbed(**options)


def test_a_signal_before_the_first_step_leaves_with_its_code(server: Server, tmp_path: Path) -> None:
    folder, held = tmp_path / "run", tmp_path / "held"
    life = server.start(folder, **OPTIONS, hold=["save", 0, str(held)])
    life.wait_until(held.exists)
    life.signal(signal.SIGTERM)
    assert life.wait() == 143
    assert "stopped by SIGTERM before the first step" in life.text()


def test_a_closed_terminal_does_not_lose_the_run(server: Server, undisturbed, tmp_path: Path) -> None:
    folder, held = tmp_path / "run", tmp_path / "held"
    life = server.start(folder, is_unheard=True, **OPTIONS, hold=["step", 7, str(held)])
    life.wait_until(held.exists)
    life.signal(signal.SIGHUP)
    held.unlink()
    assert life.wait() == 129
    assert json.loads((folder / "exit.json").read_text())["code"] == 129
    assert server.run(folder, resume=True, is_unheard=True, **OPTIONS).code == 0
    assert (numbers(folder), weights(folder)) == undisturbed(**OPTIONS)
