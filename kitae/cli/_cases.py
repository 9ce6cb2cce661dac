"""Completions to be scored offline, read from files: rows with completions, or a run's samples.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitae.config import DataSettings
from kitae.data.formats import RowError, to_example, turn_of, with_our_names
from kitae.data.readers import read_records
from kitae.errors import DataError
from kitae.types import Problem

COMPLETIONS = ("completion", "response", "output")
TURNS = ("messages", "conversations", "conversation")
OF_SAMPLES = ("step", "problem", "sample", "reward", "reason", "tokens", "finish_reason", "rewards")
"""What a run's samples.jsonl has beside the data row's own columns."""
MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One completion to score, and where it stands."""

    where: str
    completion: str
    problem: Problem


def read_cases(paths: Sequence[str], *, columns: dict[str, str], max_rows: int | None) -> list[Case]:
    """The completions of files, in order; DataError lists the rows that hold none."""
    cases: list[Case] = []
    bad: list[str] = []
    rows = 0
    for path in paths:
        for record, where in read_records(Path(path), name=path):
            if max_rows is not None and rows >= max_rows:
                break
            try:
                cases += cases_of(record, columns=columns, where=where, index=rows)
            except RowError as error:
                bad.append(f"{where}: {error}")
            rows += 1
    if bad:
        more = [f"... and {len(bad) - MAX_LISTED} more"] if len(bad) > MAX_LISTED else []
        listed = "\n  ".join([*bad[:MAX_LISTED], *more])
        raise DataError(f"{len(bad)} of {rows} rows have nothing to score:\n  {listed}")
    if not cases:
        raise DataError(f"{', '.join(paths)}: no rows")
    return cases


def cases_of(record: Any, *, columns: dict[str, str], where: str, index: int) -> list[Case]:
    """The completions of one row: a column, a list of them, or the last assistant turn. Record is any JSON value."""
    if isinstance(record, RowError):
        raise record
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise RowError("expected an object or a list of turns")
    row = {name: value for name, value in with_our_names(record, columns).items() if value is not None}
    if {"sample", "finish_reason"} <= row.keys():
        row = {name: value for name, value in row.items() if name not in OF_SAMPLES}
    texts = _take_completions(row)
    example = to_example(row, data=DataSettings(), purpose="rl")
    problem = Problem(
        prompt=example.question[-1]["content"],
        token_ids=[],
        answer=example.answer,
        columns=example.columns,
        messages=example.question,
        index=index,
    )
    numbered = len(texts) > 1
    return [
        Case(where=f"{where} ({i})" if numbered else where, completion=text, problem=problem)
        for i, text in enumerate(texts, 1)
    ]


def _take_completions(row: dict[str, Any]) -> list[str]:
    """The completions, taken out of the row."""
    if "completions" in row:
        several = row.pop("completions")
        if not isinstance(several, list) or not several:
            raise RowError("expected a list of completions", field="completions")
        return [_text_of(one, f"completions[{i}]") for i, one in enumerate(several)]
    for name in COMPLETIONS:
        if name in row:
            return [_text_of(row.pop(name), name)]
    for name in TURNS:
        turns = row.get(name)
        if isinstance(turns, list) and turns:
            last = turn_of(turns[-1], f"{name}[{len(turns) - 1}]")
            if last["role"] in ("assistant", "gpt", "model", "bot") and isinstance(last["content"], str):
                row[name] = turns[:-1]
                return [last["content"]]
    raise RowError("no completion, no completions, and no assistant turn at the end of its messages")


def _text_of(value: Any, name: str) -> str:
    """A completion as text; as turns it is the content of one assistant turn."""
    if isinstance(value, list) and len(value) == 1:
        value = turn_of(value[0], f"{name}[0]")["content"]
    if not isinstance(value, str):
        raise RowError("a completion must be text, or one assistant turn", field=name)
    return value
