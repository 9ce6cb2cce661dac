"""Metrics: lines, TensorBoard, Weights & Biases, and the page that explains every name."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kitae
from kitae.config import LogSettings
from kitae.errors import ConfigError, MissingExtraError
from kitae.train.files import JsonLines
from kitae.train.metrics import (
    Metrics,
    TensorBoardWriter,
    Window,
    open_metrics,
    read_metrics,
    require_writers,
)

ROOT = Path(__file__).resolve().parents[2]


def test_a_line_shows_means_and_the_latest_learning_rate() -> None:
    window = Window()
    window.add({"train/loss": 1.0, "train/learning_rate": 0.3})
    window.add({"train/loss": 2.0, "train/learning_rate": 0.2, "rollout/reward": 5.0})
    assert window.take() == {"train/loss": 1.5, "train/learning_rate": 0.2, "rollout/reward": 5.0}
    assert window.take() == {}


def test_a_window_survives_a_checkpoint() -> None:
    window, other = Window(), Window()
    window.add({"train/loss": 0.1})
    other.load_state(json.loads(json.dumps(window.state())))
    for w in (window, other):
        w.add({"train/loss": 0.7})
    assert window.take() == other.take() == {"train/loss": (0.1 + 0.7) / 2}


def test_nan_and_infinity_are_null_in_the_file(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path, settings=LogSettings(report_to=[]), name="n", run_id="i", config={})
    metrics.write(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/kl": 0.1})
    metrics.close()
    (line,) = read_metrics(tmp_path)
    assert (line["train/loss"], line["train/grad_norm"], line["train/kl"]) == (None, None, 0.1)


def test_a_torn_last_line_is_cut_off_when_a_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    lines = JsonLines(path)
    lines.append({"a": 3}, {"text": "line\nfeed \u2028 鍛 \ud800"})
    lines.close()
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert records == [{"a": 1}, {"a": 2}, {"a": 3}, {"text": "line\nfeed \u2028 鍛 ?"}]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    first = TensorBoardWriter(tmp_path)
    for step in range(1, 8):
        first.write(step, {"train/loss": step / 2})
    first.close()
    second = TensorBoardWriter(tmp_path)
    second.resume(4)
    for step in range(5, 10):
        second.write(step, {"train/loss": step * 2.0})
    second.close()
    assert scalars(tmp_path, "train/loss") == [(s, s / 2) for s in range(1, 5)] + [
        (s, s * 2.0) for s in range(5, 10)
    ]


def test_a_clock_set_back_does_not_put_the_resumed_events_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TensorBoardWriter(tmp_path).close()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 30 * 86400)
    TensorBoardWriter(tmp_path).close()
    numbers = [int(path.name.split(".")[3]) for path in sorted(tmp_path.iterdir())]
    assert len(numbers) == 2 and numbers[1] == numbers[0] + 1


def test_what_was_written_is_on_the_disk_at_once(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.write(1, {"train/loss": 3.0})
    assert scalars(tmp_path, "train/loss") == [(1, 3.0)]
    writer.close()


def test_wandb_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kitae\[wandb\]'"):
        require_writers(LogSettings(report_to=["wandb"]))


FAKE_WANDB = """
calls = []
class api:
    api_key = None
class _Run:
    def log(self, metrics, step): calls.append((step, metrics))
    def finish(self): calls.append("finished")
def init(**options):
    calls.append(options)
    return _Run()
"""


def test_wandb_without_a_login_writes_offline_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    settings = LogSettings(report_to=["wandb"], wandb_project="forge")
    require_writers(settings)
    metrics = open_metrics(
        tmp_path, settings=settings, name="first", run_id="abc", config={"train": {"seed": 1}}
    )
    metrics.write(1, {"train/loss": 2.0})
    metrics.close()
    options, logged, end = sys.modules["wandb"].calls
    assert (options["project"], options["name"], options["id"], options["mode"]) == (
        "forge",
        "first",
        "abc",
        "offline",
    )
    assert options["config"] == {"train": {"seed": 1}}
    assert (logged, end) == ((1, {"train/loss": 2.0}), "finished")
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "no Weights & Biases login found: writing offline, upload later with `wandb sync`"
    ]
    sys.modules.pop("wandb")


class FakeWandb(ModuleType):
    """A logged-in wandb whose network fails in one of its calls."""

    def __init__(self, *, fails_in: str) -> None:
        super().__init__("wandb")
        self.api = SimpleNamespace(api_key="secret")
        self.fails_in = fails_in
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_in:
            raise TimeoutError(f"{name} has timed out\nmore about it")

    def init(self, **options: Any) -> FakeWandb:
        assert options["settings"]["init_timeout"] <= 60, "it would wait for the network"
        self._call("init")
        return self

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self._call("log")

    def finish(self) -> None:
        self._call("finish")


def wandb_metrics(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, fails_in: str
) -> tuple[Metrics, FakeWandb]:
    fake = FakeWandb(fails_in=fails_in)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    settings = LogSettings(report_to=["wandb"])
    return open_metrics(folder, settings=settings, name="n", run_id="i", config={}), fake


def test_a_wandb_that_cannot_start_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as error:
        wandb_metrics(tmp_path, monkeypatch, fails_in="init")
    assert "log.report_to names wandb, which cannot start (init has timed out)" in str(error.value)
    assert "WANDB_MODE=offline" in str(error.value) and "leave wandb out" in str(error.value)


@pytest.mark.parametrize(("fails_in", "expected"), [("log", 1), ("finish", 1), ("nothing", 0)])
def test_a_wandb_that_fails_later_is_said_once_and_costs_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails_in: str,
    expected: int,
) -> None:
    metrics, fake = wandb_metrics(tmp_path, monkeypatch, fails_in=fails_in)
    for step in (1, 2, 3):
        metrics.write(step, {"train/loss": 1.0})
    metrics.close()
    assert fake.calls == ["init", "log", "log", "log", "finish"]
    assert len(read_metrics(tmp_path)) == 3
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert [f"does not take the metrics ({fails_in} has timed out)" in text for text in warnings] == [
        True
    ] * expected


def explained() -> set[str]:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([a-z]+/[a-z0-9_]+)`", page, flags=re.MULTILINE))


def test_every_metric_named_in_the_code_is_explained() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in Path(kitae.__path__[0]).rglob("*.py"))
    named = set(re.findall(r"""["']((?:train|eval|rollout|perf|time|data)/[a-z0-9_]+)["']""", text))
    timed = {f"time/{name}_s" for name in re.findall(r"""\.timer\(["'](\w+)["']\)""", text)}
    assert {"train/loss", "eval/loss", "rollout/reward", "time/step_s"} <= named & explained()
    assert (named | timed) - explained() == set(), "explain these in docs/metrics.md"
