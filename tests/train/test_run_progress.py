"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kitae.train.progress import LastingStderr, ProgressView, duration, summary


def test_elsewhere_than_on_a_terminal_lines_come_now_and_then() -> None:
    text = io.StringIO()
    view = ProgressView(total=100, done=0, title="sft", console=Console(file=text, width=60))
    for step in range(1, 100):
        view.update(step, {"train/loss": 2.0, "perf/tokens_per_s": 12345.6}, left_s=192.0)
    view.update(50, {"eval/loss": 1.5}, left_s=5.0)
    view.update(100, {"train/loss": 1.0}, left_s=0.0)
    view.close()
    assert text.getvalue().splitlines() == [
        "sft step 1/100  loss 2.0000  tok/s 12,346  3m12s left",
        "sft step 50/100  loss 2.0000  eval loss 1.5000  tok/s 12,346  5s left",
        "sft step 100/100  loss 1.0000  eval loss 1.5000  tok/s 12,346  0s left",
    ]


def test_on_a_terminal_a_bar_shows_the_step_and_the_time_left() -> None:
    text = io.StringIO()
    view = ProgressView(
        total=8, done=2, title="grpo", console=Console(file=text, force_terminal=True, width=100)
    )
    view.update(3, {"rollout/reward": 4.25}, left_s=61.0)
    view.close()
    assert "grpo" in text.getvalue() and "3/8" in text.getvalue() and "reward 4.250" in text.getvalue()
    assert "1m01s left" in text.getvalue()


def test_a_lost_terminal_is_no_error() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    stream = LastingStderr(Closed())
    assert stream.write("line\n") == 5
    stream.flush()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (192, "3m12s"), (7384, "2h03m")]
)
def test_time_is_said_as_people_say_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_only_what_is_worth_a_glance_is_shown() -> None:
    assert summary({"train/kl": 1.0, "eval/accuracy": 0.5}) == "accuracy 50.0%"
