"""Which evaluation was the best, and how many came since: what `save.final = best` and early stopping ask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kitae.config import SaveSettings

LARGER_IS_BETTER = ("accuracy", "reward", "format_rate", "margin")
"""Ends of metric names for which save.metric_mode = auto means max."""


class Best:
    """The best evaluation so far by save.metric; part of every checkpoint."""

    def __init__(self, settings: SaveSettings) -> None:
        self.metric = settings.metric
        is_max = settings.metric_mode == "max" or (
            settings.metric_mode == "auto" and settings.metric.endswith(LARGER_IS_BETTER)
        )
        self._sign = 1.0 if is_max else -1.0
        self.value: float | None = None
        self.step = 0
        self.evaluations_since = 0

    def see(self, step: int, results: Mapping[str, float]) -> bool:
        """Whether the evaluation after `step` is better than all before; NaN never is."""
        value = results[self.metric]
        is_better = self.value is None or self._sign * (value - self.value) > 0
        if is_better and not math.isnan(value):
            self.value, self.step, self.evaluations_since = value, step, 0
            return True
        self.evaluations_since += 1
        return False

    def state(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "value": self.value,
            "step": self.step,
            "evaluations_since": self.evaluations_since,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on comparing; values of another metric than now mean nothing and are forgotten."""
        if state["metric"] == self.metric:
            self.value, self.step = state["value"], state["step"]
            self.evaluations_since = state["evaluations_since"]
