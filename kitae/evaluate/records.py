"""What an evaluation keeps of every completion: one JSON object each, in a .jsonl file that `compare` reads again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

from kitae.errors import DataError, RunDirError


class Record(TypedDict):
    """One judged completion."""

    problem: int
    """The problem's index in its data; the same in every evaluation of that data."""
    sample: int
    """Number of the completion among those of its problem, from 0."""
    prompt: str
    completion: str
    answer: str | None
    """The gold answer."""
    found: str | None
    """The answer read from the completion, and `how` it was found."""
    how: str
    correct: bool | None
    """None where there is no gold answer to compare with."""
    right_form: bool
    reward: float | None
    reason: str
    num_tokens: int
    finish_reason: str
    columns: dict[str, Any]
    """The data row's other columns, as JSON values."""


def write_records(path: Path, records: Iterable[Record]) -> None:
    """One line per record; the file appears under its name when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        # A lone surrogate, which UTF-8 cannot hold, is written as its JSON escape.
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        part.replace(path)
    except OSError as error:
        raise RunDirError(f"cannot write the results to {path}: {error.strerror or error}") from error


def read_records(path: Path) -> list[Record]:
    """The records of a file that `write_records` wrote."""
    try:
        with path.open(encoding="utf-8") as file:
            return [_parse(line, f"{path}:{number}") for number, line in enumerate(file, 1)]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read evaluation records from {path}: {error}") from error


def _parse(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    missing = Record.__required_keys__ - (record.keys() if isinstance(record, dict) else set())
    if missing:
        raise DataError(f"{where} is not a record of kitae evaluate; it lacks {', '.join(sorted(missing))}")
    parsed: Record = record
    return parsed
