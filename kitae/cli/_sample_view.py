"""What kitae sample shows: how far it is, and what became of all answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kitae.cli.sample import Settings
    from kitae.evaluate.answers import Answer

SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_LOOKS = 10.0, 0.5


class View:
    """Progress on standard error: one line rewritten on a terminal, else a line now and then."""

    def __init__(self, *, total: int, done: int) -> None:
        self._total, self._done, self._before = total, done, done
        self._right = self._judged = self._tokens = self._live_tokens = 0
        self._is_terminal = sys.stderr.isatty()
        self._began, self._due = time.monotonic(), 0.0
        if done:
            print(f"{done:,} of {total:,} answers are there already", file=sys.stderr)

    def on_token(self) -> None:
        """One more token of an answer under way."""
        self._live_tokens += 1
        if self._is_terminal and time.monotonic() >= self._due:
            self._show()

    def update(self, answers: Sequence[Answer]) -> None:
        """Answers that have been judged."""
        self._done += len(answers)
        self._judged += len(answers)
        self._right += sum(answer["label"] is True for answer in answers)
        self._tokens += sum(answer["num_tokens"] for answer in answers)
        if time.monotonic() >= self._due:
            self._show()

    def close(self) -> None:
        """The last state stays on the terminal."""
        if self._judged:
            self._show(end="\n")

    def _show(self, end: str = "") -> None:
        from kitae.train.progress import duration

        wait = SECONDS_BETWEEN_LOOKS if self._is_terminal else SECONDS_BETWEEN_LINES
        self._due = time.monotonic() + wait
        spent = time.monotonic() - self._began
        tokens = max(self._tokens, self._live_tokens)
        parts = [f"{self._done:,} of {self._total:,} answers"]
        if self._judged:
            parts.append(f"{self._right / self._judged:.1%} right")
        if spent > 0:
            parts.append(f"{tokens / spent:,.0f} tokens/s")
        answered = self._done - self._before
        if answered and self._done < self._total:
            parts.append(f"{duration(spent / answered * (self._total - self._done))} left")
        start = "\r\x1b[K" if self._is_terminal else ""
        print(start + ", ".join(parts), end=end if self._is_terminal else "\n", file=sys.stderr, flush=True)


def show(use: Settings, summary: dict[str, Any]) -> None:
    """The summary as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"{summary['output']}: {summary['kept']:,} rows"), title_justify="left", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    too_long = f" ({summary['too_long']} too long)" if summary["too_long"] else ""
    rows = [
        ("problems asked", f"{summary['problems']:,} of {summary['rows']:,}{too_long}"),
        ("answers", f"{summary['answers']:,}"),
        ("right", f"{summary['right']:,} ({summary['right_share']:.1%})"),
        ("problems solved at least once", f"{summary['solved']:,}"),
        ("tokens", f"{summary['tokens']:,}"),
        *((f"judged: {reason}", f"{count:,}") for reason, count in list(summary["reasons"].items())[:8]),
        *((f"dropped: {reason}", f"{count:,}") for reason, count in summary["dropped"].items()),
        ("kept", f"{summary['kept']:,} rows of {summary['problems_kept']:,} problems"),
    ]
    for name, value in rows:
        table.add_row(Text(name), value)  # a reason is a user's text, not markup
    Console().print(table)
    if summary["kept"]:
        print(f"teach them: kitae train sft --model_name_or_path STUDENT --dataset_name {use.output}")


def why_none(summary: dict[str, Any]) -> str:
    """What to look at when no answer became a row."""
    parts = [f"{count} {reason}" for reason, count in list(summary["dropped"].items())[:3]]
    kinds = [f"{count} {reason}" for reason, count in list(summary["reasons"].items())[:3]]
    return (
        f"of {summary['answers']} answers {', '.join(parts) or 'none came'} (judged: {', '.join(kinds)}); look at "
        f"{summary['output']}.asked.jsonl, and at the reward's form, min_reward and the teacher's system_prompt"
    )
