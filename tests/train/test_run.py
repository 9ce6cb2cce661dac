"""A run in its directory: what it writes, refuses, evaluates, keeps, and goes on from."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kitae.config import EvalSettings, LogSettings, SaveSettings
from kitae.errors import CheckpointError, ConfigError, LockedError, NonFiniteError, RunDirError, StoppedError
from kitae.train.checkpoint import steps_in
from kitae.train.metrics import read_metrics
from kitae.train.run import Run


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITAE_HOME", str(tmp_path / "home"))


class Walk:
    """A part whose weight takes random steps; its "loss" is the distance to where it should be."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weight = torch.zeros(2)

    def step(self) -> dict[str, float]:
        self.weight += torch.rand(2)
        return {"train/loss": self.weight.sum().item(), "train/learning_rate": self.weight[0].item()}

    def state(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state(self, state: dict[str, Any]) -> None:
        self.weight.copy_(state["weight"])

    def save(self, folder: Path) -> None:
        save_file({"weight": self.weight}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")


class Planned(Exception):
    """A fault of the test's own."""


def walk(
    folder: Path,
    *,
    total: int = 6,
    every: int = 2,
    fails_in: int = 0,
    evals: dict[int, float] | None = None,
    metric: str = "eval/loss",
    patience: int = 0,
    signal_in: int = 0,
    save: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    log: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **opening: Any,
) -> tuple[Walk, list[int]]:
    """Take the steps of a walk in a run; `evals` are the results of evaluation by step."""
    taken: list[int] = []
    with Run.open(
        folder,
        config=config or {"train": {"seed": 0}},
        recipe="sft",
        save=SaveSettings(**{"steps": every, **(save or {})}),
        evaluation=EvalSettings(**(evaluation or {})),
        log=LogSettings(**{"report_to": ["none"], **(log or {})}),
        early_stopping_patience=patience,
        **opening,
    ) as run:
        part = Walk()
        run.track("walk", part)
        evaluate = None if evals is None else lambda: {metric: evals[run.step]}
        for step in run.steps(total, evaluate=evaluate):
            metrics = part.step()
            if step == fails_in:
                raise Planned(f"in step {step}")
            if step == signal_in:
                os.kill(os.getpid(), signal.SIGTERM)
            run.log(step, metrics)
            run.samples(step, [{"completion": f"c{step}"}])
            taken.append(step)
        run.finish(part.save)
    return part, taken


def lines(folder: Path, *names: str) -> list[tuple]:
    return [tuple(line.get(name) for name in ("step", *names)) for line in read_metrics(folder)]


def events(folder: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------------------ the directory


def test_a_run_leaves_the_files_of_the_architecture_page(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    part, taken = walk(folder, log={"report_to": ["tensorboard"]})
    assert taken == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints", "config.json", "events.jsonl", "exit.json", "final.json", "lock", "metrics.jsonl",
        "model.safetensors", "resources.jsonl", "run.json", "samples.jsonl", "status.json", "tensorboard", "train.log",
    ]  # fmt: skip
    assert steps_in(folder / "checkpoints") == [6, 4]
    assert load_file(folder / "model.safetensors")["weight"].tolist() == part.weight.tolist()
    status, described = load(folder / "status.json"), load(folder / "run.json")
    assert (status["state"], status["step"], status["total"], status["checkpoint"]) == ("finished", 6, 6, 6)
    assert described["settings"] == {"train": {"seed": 0}} and described["recipe"] == "sft"
    assert described["versions"]["torch"] == torch.__version__
    assert (
        described["machine"]["world_size"] == 1 and described["machine"]["threads"] == torch.get_num_threads()
    )
    exit_ = load(folder / "exit.json")
    assert (exit_["code"], exit_["reason"], exit_["step"]) == (0, "finished", 6)
    assert load(folder / "final.json") == {
        "step": 6,
        "source": "last",
        "files": ["config.json", "model.safetensors"],
    }
    assert events(folder) == ["started", "checkpoint", "checkpoint", "checkpoint", "finished"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples == [{"step": s, "completion": f"c{s}"} for s in range(1, 7)]
    for line in (folder / "resources.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["cpu_percent"] >= 0 and record["rss_mib"] > 50 and record["free_mib"] > 0
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("train/loss")] == taken


def test_a_finished_run_resumes_to_already_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    walk(tmp_path / "run")
    before = {
        p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name not in ("train.log", "lock")
    }
    _, taken = walk(tmp_path / "run", resume=True)
    assert taken == []
    assert "already finished at step 6" in capfd.readouterr().err
    assert {p: p.read_bytes() for p in before} == before


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    walk(tmp_path / "run")
    with pytest.raises(
        RunDirError, match=r"already holds a run; continue it with --resume, replace it with --overwrite"
    ):
        walk(tmp_path / "run")
    with pytest.raises(ConfigError, match="resume and overwrite are both on"):
        walk(tmp_path / "run", resume=True, overwrite=True)
    assert load(tmp_path / "run" / "status.json")["state"] == "finished"


def test_overwrite_replaces_what_is_ours_and_leaves_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    walk(folder, total=8)
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoints" / ".tmp-step_000009").mkdir()
    made_by_recipes = ("difficulty.jsonl", "reference.jsonl", "calibration.json", "nonfinite-rank0.json")
    for name in made_by_recipes:
        (folder / name).write_text("of the earlier run")
    walk(folder, total=2, overwrite=True)
    assert not any((folder / name).exists() for name in made_by_recipes)
    assert lines(folder) == [(1,), (2,)]
    assert steps_in(folder / "checkpoints") == [2]
    assert (folder / "notes.txt").read_text() == "mine"
    assert events(folder) == ["started", "checkpoint", "finished"]


def test_overwrite_never_removes_the_model_it_would_train(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    walk(folder)
    for model in (folder, folder / "checkpoints" / "step_000006"):
        with pytest.raises(ConfigError, match="overwrite would remove the model to be trained"):
            walk(folder, overwrite=True, config={"model": {"name_or_path": str(model)}})
    assert (folder / "model.safetensors").exists()


def test_a_start_that_failed_before_its_first_step_may_be_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Planned), Run.open(folder, config={}):
        raise Planned("no such model")
    assert load(folder / "exit.json")["code"] == 1
    walk(folder)
    assert load(folder / "exit.json")["code"] == 0
    assert "no such model" in (folder / "train.log").read_text()


def test_a_supervisor_may_have_put_its_files_there_before(tmp_path: Path) -> None:
    (tmp_path / "alive").touch()
    (tmp_path / "stdout.log").touch()
    walk(tmp_path)
    assert load(tmp_path / "exit.json")["code"] == 0


def test_the_lock_is_held_until_the_run_is_left(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config={}):
        with pytest.raises(LockedError, match=f"in use by process {os.getpid()} on "):
            Run.open(tmp_path / "run", config={}, resume=True)
        assert load(tmp_path / "run" / "status.json")["state"] == "starting"
    Run.open(tmp_path / "run", config={}).__exit__(None, None, None)


def test_a_failed_open_gives_everything_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Run.open(folder, config={}).__exit__(None, None, None)
    before = signal.getsignal(signal.SIGTERM)
    (folder / "events.jsonl").unlink()
    (folder / "events.jsonl").mkdir()  # cannot be opened as a file
    with pytest.raises(RunDirError, match=r"events\.jsonl"):
        Run.open(folder, config={})
    assert signal.getsignal(signal.SIGTERM) is before
    assert logging.getLogger("kitae").handlers == []
    (folder / "events.jsonl").rmdir()
    walk(folder)


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "metrics.jsonl", "config.json"])
@pytest.mark.parametrize("way", [{}, {"resume": True}, {"overwrite": True}])
def test_another_programs_output_is_not_taken_for_a_run(tmp_path: Path, name: str, way: dict) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(RunDirError, match=f"not a kitae run .it holds {name}"):
        Run.open(tmp_path, config={}, **way)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("error", "code", "state"),
    [
        (Planned("bug"), 1, "failed"),
        (NonFiniteError("loss is nan"), 70, "failed"),
        (RunDirError("disk full"), 2, "failed"),
        (KeyboardInterrupt(), 130, "stopped"),
        (SystemExit(3), 3, "failed"),
    ],
)
def test_how_a_run_ended_is_recorded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], error: BaseException, code: int, state: str
) -> None:
    with pytest.raises(type(error)), Run.open(tmp_path / "run", config={}):
        raise error
    assert load(tmp_path / "run" / "exit.json")["code"] == code
    assert load(tmp_path / "run" / "status.json")["state"] == state
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
    assert "Traceback" not in capfd.readouterr().err


def test_an_end_that_cannot_be_recorded_is_an_error_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise RunDirError("disk full")

    monkeypatch.setattr("kitae.train.run.write_exit", full)
    with pytest.raises(RunDirError, match="disk full"):
        walk(tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setenv("KITAE_HOME", str(tmp_path / "home"))
    assert not (tmp_path / "run" / "exit.json").exists()
    assert walk(tmp_path / "run", resume=True)[1] == []
    assert load(tmp_path / "run" / "exit.json")["code"] == 0


def test_secrets_and_control_characters_do_not_reach_the_log(tmp_path: Path) -> None:
    logger = logging.getLogger("kitae.test")
    with Run.open(tmp_path / "run", config={}):
        logger.info("token hf_abcdefghijk and https://me:secret99@hub.example/x, Bearer abcdefgh12345")
        logger.info("row says \x1b[31mred\x07\nERROR forged line")
    text = (tmp_path / "run" / "train.log").read_text()
    assert "hf_abc" not in text and "secret99" not in text and "abcdefgh12345" not in text
    assert "token *** and https://***@hub.example/x, Bearer ***" in text
    assert "\\x1b[31mred\\x07\n    ERROR forged line\n" in text and "\x1b" not in text


def test_a_log_that_became_large_is_put_aside_and_the_oldest_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitae.train.logs.MAX_LOG_BYTES", 2000)
    logger = logging.getLogger("kitae.test")
    with Run.open(tmp_path / "run", config={}):
        for number in range(400):
            logger.info("line %04d", number)
    kept = [tmp_path / "run" / name for name in ("train.log.3", "train.log.2", "train.log.1", "train.log")]
    assert sorted(path.name for path in (tmp_path / "run").glob("train.log*")) == sorted(p.name for p in kept)
    assert all(path.stat().st_size <= 2000 for path in kept)
    numbers = [int(line[-4:]) for path in kept for line in path.read_text().splitlines() if "line" in line]
    assert numbers == list(range(numbers[0], 400)), "a line is missing"
    walk(tmp_path / "run", overwrite=True)
    assert [path.name for path in (tmp_path / "run").glob("train.log*")] == ["train.log"]


# ------------------------------------------------------------------------------------------------ resuming


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    evals = {s: 1 / s for s in range(1, 10)}
    walk(folder / "run", total=9, every=2, evals=evals, evaluation={"steps": 4}, log={"steps": 3})
    return folder / "run"


@pytest.mark.parametrize("fails_in", range(1, 10))
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path, undisturbed: Path, fails_in: int) -> None:
    folder = tmp_path / "run"
    options = {
        "total": 9, "every": 2, "evals": {s: 1 / s for s in range(1, 10)}, "evaluation": {"steps": 4},
        "log": {"steps": 3},
    }  # fmt: skip
    with pytest.raises(Planned):
        walk(folder, fails_in=fails_in, **options)
    walk(folder, resume=True, **options)
    names = ("train/loss", "train/learning_rate", "eval/loss")
    assert lines(folder, *names) == lines(undisturbed, *names)
    assert (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert (folder / "samples.jsonl").read_text() == (undisturbed / "samples.jsonl").read_text()
    assert [step for (step,) in lines(folder)] == [3, 4, 6, 8, 9]


def test_lines_are_means_since_the_last_line(tmp_path: Path, undisturbed: Path) -> None:
    walk(tmp_path / "run", total=9)
    single = dict(lines(tmp_path / "run", "train/loss"))
    expected = [sum(single[s] for s in group) / len(group) for group in ([1, 2, 3], [4], [5, 6], [7, 8], [9])]
    assert [loss for _, loss in lines(undisturbed, "train/loss")] == expected


def test_events_keep_the_history_of_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Planned):
        walk(folder, fails_in=5)
    walk(folder, resume=True)
    assert events(folder) == [
        "started", "checkpoint", "checkpoint", "failed", "resumed", "restored", "checkpoint", "finished",
    ]  # fmt: skip


def test_a_resume_of_nothing_starts_at_the_beginning_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Planned):
        walk(folder, every=0, fails_in=4)
    walk(folder, every=0, resume=True)
    assert "nothing was saved" in capfd.readouterr().err
    assert [step for (step,) in lines(folder)] == [1, 2, 3, 4, 5, 6]
    walk(tmp_path / "new", resume=True)


def test_a_vanished_checkpoint_is_no_reason_to_start_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Planned):
        walk(folder, fails_in=4)
    (folder / "checkpoints").rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="says that step 2 was saved"):
            walk(folder, resume=True)
    (tmp_path / "elsewhere").rename(folder / "checkpoints")
    assert walk(folder, resume=True)[1] == [3, 4, 5, 6]


def test_a_checkpoint_of_other_parts_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Planned):
        walk(folder, fails_in=4)
    with Run.open(folder, config={"train": {"seed": 0}}, resume=True) as run:
        run.track("walk", Walk())
        run.track("buffer", Walk())
        with pytest.raises(CheckpointError, match="holds walk, but this run consists of buffer, walk"):
            next(iter(run.steps(6)))


def test_a_finished_run_can_be_made_longer_inexactly(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    walk(folder, config={"train": {"max_steps": 6}})
    _, taken = walk(folder, total=8, config={"train": {"max_steps": 8}}, resume=True, allow_inexact=True)
    assert taken == [7, 8]
    assert load(folder / "run.json")["inexact"] == ["step 6: train.max_steps 6 -> 8"]
    assert load(folder / "final.json")["step"] == 8


def test_a_signal_stops_at_the_end_of_the_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="stopped by SIGTERM after step 3 of 6") as caught:
        walk(folder, signal_in=3)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_in(folder / "checkpoints") == [3, 2]
    assert walk(folder, resume=True)[1] == [4, 5, 6]


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    walk(tmp_path / "run", signal_in=6)
    assert load(tmp_path / "run" / "exit.json")["code"] == 0


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_comes_at_the_start_in_between_and_at_the_end(tmp_path: Path) -> None:
    evals = {0: 9.0, 2: 8.0, 4: 7.0, 5: 6.0}
    walk(tmp_path / "run", total=5, evals=evals, evaluation={"steps": 2, "at_start": True})
    assert lines(tmp_path / "run", "eval/loss") == [
        (0, 9.0),
        (1, None),
        (2, 8.0),
        (3, None),
        (4, 7.0),
        (5, 6.0),
    ]


def test_without_eval_steps_evaluation_comes_once_at_the_end(tmp_path: Path) -> None:
    walk(tmp_path / "run", evals={6: 1.5})
    assert [value for _, value in lines(tmp_path / "run", "eval/loss")] == [None] * 5 + [1.5]


@pytest.mark.parametrize("fails_in", [0, 4, 6])
def test_the_best_weights_end_at_the_top_whatever_was_kept(tmp_path: Path, fails_in: int) -> None:
    folder = tmp_path / "run"
    options: dict[str, Any] = {
        "evals": {1: 5.0, 2: 1.0, 3: 3.0, 4: float("nan"), 5: 2.0, 6: 1.0}, "evaluation": {"steps": 1}, "every": 1,
        "save": {"final": "best", "keep": 1},
    }  # fmt: skip
    if fails_in:
        with pytest.raises(Planned):
            walk(folder, fails_in=fails_in, **options)
    walk(folder, resume=bool(fails_in), **options)
    reference, _ = walk(tmp_path / "two steps", total=2)
    assert load_file(folder / "model.safetensors")["weight"].tolist() == reference.weight.tolist()
    assert load(folder / "final.json")["step"] == 2 and load(folder / "final.json")["source"] == "best"
    assert load(folder / "status.json")["best"] == {"metric": "eval/loss", "value": 1.0, "step": 2}
    assert steps_in(folder / "checkpoints") == [6, 2]


def test_the_best_may_be_the_model_it_started_from(tmp_path: Path) -> None:
    options = {"evaluation": {"steps": 3, "at_start": True}, "save": {"final": "best"}}
    walk(tmp_path / "run", evals={0: 1.0, 3: 2.0, 6: 3.0}, **options)
    assert load_file(tmp_path / "run" / "model.safetensors")["weight"].tolist() == [0.0, 0.0]


def test_a_larger_accuracy_is_better_and_the_mode_can_be_set(tmp_path: Path) -> None:
    for mode, best in (("auto", 2), ("max", 2), ("min", 4)):
        walk(
            tmp_path / mode,
            evals={2: 0.9, 4: 0.1, 6: 0.5},
            metric="eval/accuracy",
            evaluation={"steps": 2},
            save={"final": "best", "metric": "eval/accuracy", "metric_mode": mode},
        )
        assert load(tmp_path / mode / "final.json")["step"] == best


def test_early_stopping_ends_after_patience_and_survives_a_resume(tmp_path: Path) -> None:
    evals = dict(enumerate([5.0, 4.0, 4.5, 4.4, 4.3, 1.0, 1.0, 1.0, 1.0], start=1))
    options: dict[str, Any] = {
        "total": 9, "every": 1, "evals": evals, "evaluation": {"steps": 1}, "patience": 3,
        "save": {"final": "best"},
    }  # fmt: skip
    _, taken = walk(tmp_path / "whole", **options)
    assert taken == [1, 2, 3, 4, 5]
    assert load(tmp_path / "whole" / "final.json")["step"] == 2
    with pytest.raises(Planned):
        walk(tmp_path / "cut", fails_in=4, **options)
    assert walk(tmp_path / "cut", resume=True, **options)[1] == [4, 5]


def test_settings_that_need_an_evaluation_are_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"save\.final is best, but the run has no evaluation data"):
        walk(tmp_path / "a", save={"final": "best"})
    with pytest.raises(ConfigError, match=r"early_stopping_patience is 2, but the run does not evaluate"):
        walk(tmp_path / "b", patience=2, evals={6: 1.0})
    with pytest.raises(
        ConfigError,
        match=r"save\.metric is eval/accuracy, which evaluation does not report; use one of eval/loss",
    ):
        walk(tmp_path / "c", evals={6: 1.0}, save={"final": "best", "metric": "eval/accuracy"})
