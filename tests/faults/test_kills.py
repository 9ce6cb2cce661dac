"""kill -9 at random moments, half of them inside a save: nothing is lost but the steps since the last checkpoint."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from fault_outcome import numbers, weights
from fault_server import Life, Server

OPTIONS = {"total": 12, "width": 512, "save": {"steps": 2, "keep": 1}, "evaluation": {"steps": 4}}


def is_saving(folder: Path) -> bool:
    try:
        return any(name.startswith((".tmp-", ".del-")) for name in os.listdir(folder / "checkpoints"))
    except FileNotFoundError:
        return False


def kill_inside_a_save(life: Life, folder: Path, rng: random.Random) -> None:
    """Kill while a checkpoint is being written or removed, some saves and up to 3 ms in."""
    saves, was_saving = rng.randrange(4), False
    while os.path.exists(f"/proc/{life.pid}"):
        if (now := is_saving(folder)) and not was_saving:
            saves -= 1
        was_saving = now
        if now and saves < 0:
            time.sleep(rng.uniform(0, 0.003))
            break
        if not now and life.poll() is not None:
            return
    life.signal(signal.SIGKILL)


def test_twenty_random_kills_change_no_number(server: Server, undisturbed, tmp_path: Path) -> None:
    expected = undisturbed(**OPTIONS)
    rng = random.Random(11)
    kills = kills_in_saves = runs = 0
    while kills < 20 or (kills_in_saves < 5 and runs < 60):  # a busy machine's saves are harder to hit
        folder = tmp_path / f"run_{runs}"
        runs += 1
        code: int | None = -9
        while code == -9:
            life = server.start(folder, resume=True, **OPTIONS)
            needs_more = kills < 20 or kills_in_saves < 5
            if needs_more and rng.random() < 0.5:
                kill_inside_a_save(life, folder, rng)
            elif kills < 20:
                time.sleep(rng.uniform(0.02, 0.3))
                life.signal(signal.SIGKILL)
            code = life.wait()
            kills += code == -9
            kills_in_saves += code == -9 and is_saving(folder)
            if code == -9 and any((folder / "checkpoints").glob("step_*")):
                assert_little_is_lost(folder)
        assert code == 0, life.text()
        assert (numbers(folder), weights(folder)) == expected
        assert not is_saving(folder)
    assert kills_in_saves >= 5, f"only {kills_in_saves} of {kills} kills were inside a save"


def assert_little_is_lost(folder: Path) -> None:
    logged = max((line[0] for line in torn_numbers(folder)), default=0)
    saved = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*"))
    assert logged - saved <= OPTIONS["save"]["steps"]


def torn_numbers(folder: Path) -> list[tuple]:
    """The steps of metrics.jsonl where its last line may be half written."""
    text = (folder / "metrics.jsonl").read_text()
    whole = text[: text.rfind("\n") + 1]
    return [(int(line.split(",")[0].removeprefix('{"step": ')),) for line in whole.splitlines()]


def test_a_kill_in_the_final_save_leaves_a_run_that_can_be_finished(
    server: Server, undisturbed, tmp_path: Path
) -> None:
    expected = undisturbed(**OPTIONS)
    for delay in (0.0, 0.001, 0.002, 0.004):
        folder = tmp_path / f"run_{delay}"
        life = server.start(folder, **OPTIONS)
        while not (folder / ".tmp-final").exists() and life.poll() is None:
            time.sleep(0.0002)
        time.sleep(delay)
        life.signal(signal.SIGKILL)
        life.wait()
        assert server.run(folder, resume=True, **OPTIONS).code == 0
        assert (numbers(folder), weights(folder)) == expected
        assert not (folder / ".tmp-final").exists()
        assert (folder / "config.json").read_text() == "{}"
