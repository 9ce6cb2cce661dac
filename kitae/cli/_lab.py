"""The reward lab: completions scored offline, what the scores are like, and where rewards disagree.

cases --measure--> Measured, with what fools the reward (_shapes.py) --summary, disagreement--> numbers
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from kitae.cli._cases import Case
from kitae.cli._shapes import Finding, try_shapes
from kitae.config import RewardSettings
from kitae.plugins import names_model, short_names
from kitae.rewards.pool import RewardPool
from kitae.types import Problem, Score

BINS = 10
Say = Callable[[int], None]
"""Told how many completions are scored so far."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one reward says of every case, and how long each took."""

    name: str
    scores: list[Score]
    seconds: list[float]
    is_model: bool
    """A reward model reads many completions at once, so its seconds are shares of the whole time."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        return [score.value for score in self.scores if score.value is not None]


def measure(
    names: Sequence[str], cases: Sequence[Case], *, settings: RewardSettings, say: Say
) -> list[Measured]:
    """Score all cases with each reward, one after the other, and try the shapes on it."""
    return [
        _measure(name, short, cases, settings=settings, say=say)
        for name, short in zip(names, short_names(names), strict=True)
    ]


def _measure(name: str, short: str, cases: Sequence[Case], *, settings: RewardSettings, say: Say) -> Measured:
    items = [(case.completion, case.problem) for case in cases]
    if names_model(name):
        from kitae.recipes._rewards import RewardModel

        model = RewardModel.load(name)
        began = time.perf_counter()
        scores = model.score(items)
        seconds = [(time.perf_counter() - began) / len(items)] * len(items)
        findings = try_shapes(model.score, cases)
        return Measured(name=short, scores=scores, seconds=seconds, is_model=True, findings=findings)
    # on_error: a completion on which the function fails is a result here, and no reason to stop.
    own = settings.model_copy(update={"function": name, "on_error": "mask"})
    with RewardPool(own) as pool, ThreadPoolExecutor(own.num_workers) as threads:
        timed = []
        for done, result in enumerate(threads.map(partial(_timed, pool), items), 1):
            timed.append(result)
            say(done)
        findings = try_shapes(pool.score, cases)
    return Measured(
        name=short,
        scores=[score for score, _ in timed],
        seconds=[seconds for _, seconds in timed],
        is_model=False,
        findings=findings,
    )


def _timed(pool: RewardPool, item: tuple[str, Problem]) -> tuple[Score, float]:
    """One score, and the seconds it took; there are as many callers as workers, so nobody waits for one."""
    began = time.perf_counter()
    [score] = pool.score([item])
    return score, time.perf_counter() - began


# summaries --------------------------------------------------------------------------------------------------------


def histogram(values: Sequence[float]) -> list[tuple[str, int]]:
    """Label and count of each value where they are few, else of BINS equal ranges."""
    counts = Counter(values)
    if len(counts) <= BINS:
        return [(f"{value:g}", count) for value, count in sorted(counts.items())]
    found, edges = np.histogram(np.asarray(values), bins=BINS)
    return [
        (f"{low:.4g} to {high:.4g}", int(count))
        for low, high, count in zip(edges[:-1], edges[1:], found, strict=True)
    ]


def reasons(scores: Sequence[Score]) -> list[tuple[str, int]]:
    """How often each kind of reason was given, most frequent first; what differs from row to row is left out.

    Example: "wrong: 12, expected 13" counts as "wrong", and "2 <answer>" as "N <answer>".
    """
    kinds = Counter(re.sub(r"\d+(?:\.\d+)?", "N", score.reason.partition(":")[0]) for score in scores)
    return [(kind, count) for kind, count in kinds.most_common() if kind]


def unscored(cases: Sequence[Case], scores: Sequence[Score]) -> dict[str, list[str]]:
    """Why completions could not be scored, each with where they stand."""
    found: dict[str, list[str]] = {}
    for case, score in zip(cases, scores, strict=True):
        if score.value is None:
            found.setdefault(score.reason, []).append(case.where)
    return found


def summary(measured: Measured, cases: Sequence[Case]) -> dict[str, Any]:
    """Everything about one reward as JSON values."""
    values = measured.values
    slowest = sorted(zip(measured.seconds, cases, strict=True), key=lambda pair: -pair[0])[:3]
    numbers = {
        "mean": float(np.mean(values)), "std": float(np.std(values)), "min": min(values), "max": max(values),
    } if values else {}  # fmt: skip
    return {
        "completions": len(cases),
        "scored": len(values),
        **numbers,
        "histogram": histogram(values),
        "reasons": reasons([score for score in measured.scores if score.value is not None]),
        "unscored": unscored(cases, measured.scores),
        "seconds": {
            "median": float(np.median(measured.seconds)),
            "p95": float(np.percentile(measured.seconds, 95)),
            "longest": max(measured.seconds),
            "slowest": [] if measured.is_model else [[case.where, seconds] for seconds, case in slowest],
            "is_share_of_a_batch": measured.is_model,
        },
        "shapes": {finding.shape: finding.mean for finding in measured.findings},
        "notes": [{"kind": f.kind, "text": f.text} for f in measured.findings if f.kind],
    }


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """Two rewards on the cases both could score."""

    first: str
    second: str
    count: int
    spearman: float | None
    """Correlation of the ranks, 1 where they order alike; None where one of them gives everyone the same."""
    opposite: float
    """Share of the cases that one puts above its own mean and the other below."""
    worst: list[tuple[Case, float, float]]
    """The cases whose ranks are farthest apart, with both scores; none where one of them gives everyone the same."""


def disagreement(first: Measured, second: Measured, cases: Sequence[Case], *, top: int) -> Disagreement:
    pairs = [
        (case, a.value, b.value)
        for case, a, b in zip(cases, first.scores, second.scores, strict=True)
        if a.value is not None and b.value is not None
    ]
    a, b = np.array([p[1] for p in pairs]), np.array([p[2] for p in pairs])
    rank_a, rank_b = ranks(a), ranks(b)
    has_spread = len(pairs) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
    apart = np.abs(rank_a - rank_b)
    order = [int(i) for i in np.argsort(-apart, kind="stable")[:top] if apart[i] > 0] if has_spread else []
    return Disagreement(
        first=first.name,
        second=second.name,
        count=len(pairs),
        spearman=float(np.corrcoef(rank_a, rank_b)[0, 1]) if has_spread else None,
        opposite=float(np.mean((a - a.mean()) * (b - b.mean()) < 0)) if has_spread else 0.0,
        worst=[pairs[i] for i in order],
    )


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank. Example: [5, 7, 5] -> [1.5, 3, 1.5]."""
    order = np.sort(values)
    below, upto = np.searchsorted(order, values, "left"), np.searchsorted(order, values, "right")
    return (below + 1 + upto) / 2


def rows_of(measured: Sequence[Measured], cases: Sequence[Case]) -> list[Mapping[str, Any]]:
    """Every case with what each reward says of it, as JSON values."""
    return [
        {
            "where": case.where,
            "scores": {m.name: m.scores[i].value for m in measured},
            "reasons": {m.name: m.scores[i].reason for m in measured},
        }
        for i, case in enumerate(cases)
    ]
