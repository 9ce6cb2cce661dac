"""What health rules look at: the values of a run's metrics so far, as few of them as the rules need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, pvariance
from typing import Any

FIRST, LAST = 20, 60
"""So many values of a metric are kept from its beginning, and from its end."""
PEAK = 5
"""A metric's peak is the highest mean of so many values in a row."""


class Series:
    """One metric: its first values, its last ones, and its highest mean of PEAK in a row."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.last: list[float] = []
        self.steps: list[int] = []
        """The steps of `last`."""
        self.count = 0
        self.peak = -math.inf

    def add(self, step: int, value: float) -> None:
        if len(self.first) < FIRST:
            self.first.append(value)
        self.last, self.steps = [*self.last, value][-LAST:], [*self.steps, step][-LAST:]
        self.count += 1
        if self.count >= PEAK:
            self.peak = max(self.peak, fmean(self.last[-PEAK:]))

    def state(self) -> dict[str, Any]:
        peak = self.peak if math.isfinite(self.peak) else None
        return {
            "first": self.first,
            "last": self.last,
            "steps": self.steps,
            "count": self.count,
            "peak": peak,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.first, self.last, self.steps = list(state["first"]), list(state["last"]), list(state["steps"])
        self.count = state["count"]
        self.peak = -math.inf if state["peak"] is None else state["peak"]


class Seen:
    """What rules look at: the series so far, the run's settings, its recipe."""

    def __init__(self, series: Mapping[str, Series], settings: Mapping[str, Any], recipe: str) -> None:
        self._series, self._settings, self.recipe = series, settings, recipe

    def count(self, name: str) -> int:
        return self._series[name].count if name in self._series else 0

    def first(self, name: str, n: int, *, skip: int = 0) -> float | None:
        """Mean of the first n values after `skip`; None where there are fewer."""
        values = self._series[name].first[skip : skip + n] if name in self._series else []
        return fmean(values) if len(values) == n else None

    def last(self, name: str, n: int) -> float | None:
        """Mean of the last n values; None where there are fewer."""
        values = self.values(name, n)
        return fmean(values) if values else None

    def values(self, name: str, n: int) -> list[float]:
        """The last n values, or none where there are fewer."""
        values = self._series[name].last[-n:] if name in self._series else []
        return values if len(values) == n else []

    def step_before(self, name: str, n: int) -> int:
        """The step of the n-th last value."""
        return self._series[name].steps[-n]

    def peak(self, name: str) -> float:
        return self._series[name].peak

    def setting(self, name: str) -> Any:
        """A setting's value by its full name; None where this run has none of that name."""
        value: Any = self._settings
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    def has_setting(self, name: str) -> bool:
        section, _, field = name.rpartition(".")
        inside = self.setting(section) if section else self._settings
        return isinstance(inside, Mapping) and field in inside

    def did_not_rise(self, name: str) -> bool:
        """Whether the last 5 values are at most a tenth of their spread above the first 10; false where that is unknown."""
        before, now = self.first(name, 10), self.last(name, 5)
        if before is None or now is None:
            return False
        return now <= before + 0.1 * math.sqrt(pvariance(self._series[name].first[:10])) + 1e-9
