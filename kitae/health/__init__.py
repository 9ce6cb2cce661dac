"""Health notes: what a run's numbers say is going wrong, each in one sentence with the setting to change.

metric lines --Watch.see--> series of the names the rules need --rules--> notes (terminal, train.log, events.jsonl)

A note is said once. It is said again after the trouble was over for a while, or when its number has doubled. Rules
look at lines as metrics.jsonl has them, so a resumed run says what an uninterrupted one says. docs/health.md lists them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from kitae.health.rules import RULES, Rule, main_metrics
from kitae.health.series import Seen, Series


class Note(NamedTuple):
    """What is wrong, as of which step, and the full name of the setting to change."""

    rule: str
    step: int
    sentence: str
    setting: str


class Watch:
    """Looks at a run's metric lines and says what is wrong. Its state belongs to a checkpoint."""

    def __init__(self, *, settings: Mapping[str, Any], recipe: str) -> None:
        """`settings` are the run's resolved settings as JSON values."""
        self._series: dict[str, Series] = {}
        self._names = {name for rule in RULES for name in rule.metrics}
        self._said: dict[str, dict[str, float]] = {}
        """Of each note that stands: its size, the lines since it was said, and those of them without a finding."""
        self._seen = Seen(self._series, settings, recipe)

    def see(self, step: int, line: Mapping[str, float | None]) -> list[Note]:
        """Take a line of metrics.jsonl, and return the notes it gives rise to. Only finite numbers are looked at."""
        fresh = {}
        for name in self._names & set(line):
            value = line[name]
            if value is not None and math.isfinite(value):
                fresh[name] = value
                self._series.setdefault(name, Series()).add(step, value)
        found = [
            self._look(rule, step) for rule in RULES if any(name in fresh for name in main_metrics(rule))
        ]
        return [note for note in found if note is not None]

    def _look(self, rule: Rule, step: int) -> Note | None:
        finding = rule.check(self._seen)
        said = self._said.get(rule.name)
        if said is not None:
            said["lines"] += 1
            said["quiet"] = said["quiet"] + 1 if finding is None else 0
            if said["quiet"] >= rule.quiet:
                del self._said[rule.name]
        has_doubled = said is None or (finding is not None and finding.size >= 2 * said["size"])
        if finding is None or not has_doubled or (said is not None and said["lines"] < rule.quiet):
            return None
        self._said[rule.name] = {"size": finding.size, "lines": 0, "quiet": 0}
        what, setting = next(
            (remedy for remedy in rule.remedies if self._seen.has_setting(remedy[1])), rule.remedies[-1]
        )
        value = self._seen.setting(setting)
        now = f" (now {value:g})" if isinstance(value, int | float) and not isinstance(value, bool) else ""
        return Note(rule.name, step, f"{finding.text}; {what} {setting}{now}", setting)

    def state(self) -> dict[str, Any]:
        series = {name: series.state() for name, series in self._series.items()}
        return {"series": series, "said": {name: dict(said) for name, said in self._said.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._series.clear()
        for name, saved in state["series"].items():
            self._series[name] = Series()
            self._series[name].load_state(saved)
        self._said = {name: dict(said) for name, said in state["said"].items()}
