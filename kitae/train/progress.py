"""What a person sees while a run goes on: a bar on a terminal, now and then a line elsewhere; rank 0 only."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0
SHOWN = (
    ("train/loss", "loss", "{:.4f}"),
    ("rollout/reward", "reward", "{:.3f}"),
    ("eval/loss", "eval loss", "{:.4f}"),
    ("eval/accuracy", "accuracy", "{:.1%}"),
    ("perf/tokens_per_s", "tok/s", "{:,.0f}"),
)


class ProgressView:
    """Shows step, loss or reward, speed and time left."""

    def __init__(self, *, total: int, done: int, title: str, console: Console) -> None:
        self._total, self._title, self._console = total, title, console
        self._shown: dict[str, float] = {}
        self._last_line = -SECONDS_BETWEEN_LINES
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[metrics]}"),
                _TimeLeft(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, metrics="", left="")
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float], *, left_s: float | None) -> None:
        self._shown |= metrics
        text = summary(self._shown)
        left = f"{duration(left_s)} left" if left_s is not None else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=text, left=left)
            return
        now = time.monotonic()
        is_news = step == self._total or any(name.startswith("eval/") for name in metrics)
        if is_news or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            line = "  ".join(
                part for part in (f"{self._title} step {step}/{self._total}", text, left) if part
            )
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class LastingStderr:
    """The error stream, which may go away: a closed terminal, a reader that left. Then what is printed is dropped.

    The run goes on; train.log has every line.
    """

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_lost = False

    def write(self, text: str) -> int:
        try:
            if not self._is_lost:
                self._stream.write(text)
        except OSError:
            self._is_lost = True
        return len(text)

    def flush(self) -> None:
        try:
            if not self._is_lost:
                self._stream.flush()
        except OSError:
            self._is_lost = True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def make_console(*, is_quiet: bool) -> Console:
    """The console that a run's bar and lines go to."""
    return Console(file=cast(TextIO, LastingStderr(sys.stderr)), quiet=is_quiet)


class _TimeLeft(ProgressColumn):
    """The run's own estimate; rich's would start from nothing after a resume."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["left"]), style="cyan")


def summary(metrics: Mapping[str, float]) -> str:
    """The few metrics worth a glance: "loss 0.6931  tok/s 12,300"."""
    return "  ".join(
        f"{label} {form.format(metrics[name])}" for name, label, form in SHOWN if name in metrics
    )


def duration(seconds: float) -> str:
    """Time as people say it: 5 -> "5s", 192 -> "3m12s", 7384 -> "2h03m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class ConsoleHandler(logging.Handler):
    """Log lines printed through the console that draws the bar, so that they appear above it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


class Ticker:
    """Says every ten seconds how far a long pass over the data is, and how long it will still take."""

    def __init__(self, what: str, *, total: int | None = None) -> None:
        self._what, self._total = what, total
        self._began = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said < 10 or not done:
            return
        self._said = now
        left = (now - self._began) / done * (self._total - done) if self._total else None
        logger.info(
            "%d%s %s%s",
            done,
            f" of {self._total}" if self._total else "",
            self._what,
            "" if left is None else f", {left:.0f} s left",
        )


def as_text(table: Table) -> str:
    """A table as lines of text, for the log."""
    console = Console(width=110, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n" + capture.get().rstrip()
