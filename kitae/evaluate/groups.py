"""Any summary by a data column: how much worse one subject, level or language is than another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from kitae.errors import DataError
from kitae.plugins import did_you_mean

AnyRecord = TypeVar("AnyRecord", bound=Mapping[str, Any])


class Gap(NamedTuple):
    """Between which groups a metric differs most, and by how much."""

    metric: str
    lowest: str
    highest: str
    gap: float


def by_column(
    records: Iterable[AnyRecord],
    column: str,
    *,
    summarise: Callable[[Iterable[AnyRecord]], dict[str, float]],
) -> dict[str, dict[str, float]]:
    """One summary for each value of the column, in the values' order; rows without it are the group "(none)"."""
    records = list(records)
    require_column(column, (record["columns"] for record in records))
    groups: dict[str, list[AnyRecord]] = {}
    for record in records:
        groups.setdefault(str(record["columns"].get(column, "(none)")), []).append(record)
    return {value: summarise(groups[value]) for value in sorted(groups)}


def require_column(column: str, columns: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a column that none of the rows has; `columns` are those of each row."""
    names = {name for row in columns for name in row}
    if column not in names:
        known = did_you_mean(column, sorted(names)) if names else "the rows have no other columns"
        raise DataError(f"no row has a column {column!r} to report by; {known}")


def gap(groups: Mapping[str, Mapping[str, float]], metric: str) -> Gap | None:
    """The gap in `metric` between the groups that have it; None if fewer than two do."""
    values = {name: summary[metric] for name, summary in groups.items() if metric in summary}
    if len(values) < 2:
        return None
    lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return Gap(metric, lowest, highest, values[highest] - values[lowest])
