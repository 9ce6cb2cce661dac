"""Whether one model is better than another, judged on the same problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kitae.errors import DataError
from kitae.evaluate.records import Record
from kitae.evaluate.stats import bootstrap_mean, exact_mcnemar


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Accuracies on the problems both evaluations have, and what is known of their difference."""

    problems: int
    unpaired: int
    """Problems left out because only one evaluation has them."""
    first: float
    second: float
    difference: float
    """second - first."""
    low: float
    high: float
    """95 % interval of the difference, by a paired bootstrap over problems."""
    first_better: int
    second_better: int
    """Problems on which one model has more right completions than the other."""
    p_value: float
    """Chance of a split this uneven, or more, were both equally good (exact McNemar test)."""


def compare(first: Sequence[Record], second: Sequence[Record], *, seed: int = 0) -> Comparison:
    """Pair two evaluations of the same data by problem. With several samples a problem counts as their mean."""
    firsts, seconds = _by_problem(first), _by_problem(second)
    paired = sorted(firsts.keys() & seconds.keys())
    if not paired:
        raise DataError(
            f"nothing to compare: the evaluations ({len(firsts)} and {len(seconds)} problems with gold answers) "
            f"have no problem in common; evaluate both models on the same data"
        )
    differences = [seconds[key] - firsts[key] for key in paired]
    first_better, second_better = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    low, high = bootstrap_mean(differences, seed=seed)
    return Comparison(
        problems=len(paired),
        unpaired=len(firsts.keys() ^ seconds.keys()),
        first=sum(firsts[key] for key in paired) / len(paired),
        second=sum(seconds[key] for key in paired) / len(paired),
        difference=sum(differences) / len(paired),
        low=low,
        high=high,
        first_better=first_better,
        second_better=second_better,
        p_value=exact_mcnemar(first_better, second_better),
    )


def _by_problem(records: Sequence[Record]) -> dict[tuple[int, str], float]:
    """Share of right completions of each problem; a problem is its index and its prompt."""
    correct: dict[tuple[int, str], list[bool]] = {}
    for record in records:
        if record["correct"] is not None:
            correct.setdefault((record["problem"], record["prompt"]), []).append(record["correct"])
    return {key: sum(values) / len(values) for key, values in correct.items()}
