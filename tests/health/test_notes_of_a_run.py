"""Notes reach terminal, log and events of a run, and neither kill nor resume says one twice or loses it."""

import json

import pytest

from kitae.config import EvalSettings, LogSettings, SaveSettings
from kitae.train.run import Run

SETTINGS = {"rollout": {"max_new_tokens": 16}}
TOTAL = 8


class Counter:
    """A part with state, as a run needs one."""

    def __init__(self):
        self.n = 0

    def state(self):
        return {"n": self.n}

    def load_state(self, state):
        self.n = state["n"]


def live(folder, *, dies_in=0, resume=False, save=4, evaluation=None, **log):
    """Cut completions at every step: `all_truncated` is said at step 3. Dies in the body of a step."""
    with Run.open(
        folder,
        config=SETTINGS,
        recipe="grpo",
        save=SaveSettings(steps=save),
        evaluation=EvalSettings(**(evaluation or {})),
        log=LogSettings(report_to=["none"], **log),
        resume=resume,
    ) as run:
        run.track("counter", Counter())
        losses = iter([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
        for step in run.steps(TOTAL, evaluate=(lambda: {"eval/loss": next(losses)}) if evaluation else None):
            if step == dies_in:
                raise ArithmeticError(f"planned in step {step}")
            run.log(step, {"rollout/truncated": 1.0})
        run.finish(lambda folder: (folder / "config.json").write_text("{}"))


def notes(folder):
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [(e["step"], e["rule"], e["setting"]) for e in events if e["event"] == "health"]


TRUNCATED = (3, "all_truncated", "rollout.max_new_tokens")


def test_a_note_is_on_the_terminal_in_the_log_and_in_the_events(tmp_path, capsys):
    live(tmp_path / "run")
    assert notes(tmp_path / "run") == [TRUNCATED]
    said = "health at step 3: 100% of the completions of the last 3 rounds were cut before they ended; raise "
    said += "rollout.max_new_tokens (now 16)"
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert (tmp_path / "run" / "train.log").read_text().count(said) == 1
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert said.removeprefix("health at step 3: ") in events


def test_evaluations_are_looked_at(tmp_path):
    live(tmp_path / "run", evaluation={"steps": 2, "at_start": True})
    assert (6, "eval_loss_rising", "optim.learning_rate") in notes(tmp_path / "run")


def test_notes_are_turned_off_by_log_health(tmp_path):
    live(tmp_path / "run", health=False)
    assert notes(tmp_path / "run") == []


@pytest.mark.parametrize("dies_in", [2, 3, 4, 5, 7])
def test_a_killed_and_resumed_run_says_each_note_once(dies_in, tmp_path):
    """Checkpoints are at 4 and 8: the note of step 3 lies before or behind the one that is resumed from."""
    folder = tmp_path / "run"
    with pytest.raises(ArithmeticError):
        live(folder, dies_in=dies_in)
    before = notes(folder)
    assert before == ([TRUNCATED] if dies_in > 3 else [])
    live(folder, resume=True)
    assert notes(folder) == [TRUNCATED]


def test_a_spoilt_line_of_the_events_does_not_stop_a_resume(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ArithmeticError):
        live(folder, dies_in=4)
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "health", "step\n')
    live(folder, resume=True)
    assert (folder / "events.jsonl").read_text().count('"all_truncated"') == 1
