"""One file to records, strictly: what another reader would quietly repair or lose is reported with its line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kitae.data.formats import RowError
from kitae.errors import DataError

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ARRAY_BYTES = 1024 * 1024 * 1024
MAX_PARQUET_RATIO = 100
BOM = b"\xef\xbb\xbf"

Records = Iterator[tuple[Any, str]]
"""Record and `file:line`; in place of a record that cannot be read stands the RowError that says why."""


def read_records(path: Path, *, name: str) -> Records:
    """Every record of a file, by its ending; `name` is what messages call the file."""
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{name}: unknown kind of file {path.suffix!r}; known are {', '.join(READERS)}")
    try:
        yield from read(path, name)
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from error


def strict_json(text: str) -> Any:
    """JSON as the standard has it: no NaN, no duplicate names, no number that overflows; RowError otherwise."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.pos + 1}") from error
    except RecursionError as error:
        raise RowError("nested too deep") from error
    except ValueError as error:
        if isinstance(error, RowError):
            raise
        raise RowError(f"not JSON: {error}") from error


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | RowError]]:
    """Numbered lines without their ends, cut at line feeds only; a line that is too long is read over."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(BOM)
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, RowError(f"line longer than {MAX_LINE_BYTES // 1024**2} MiB")
        else:
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _text(line: bytes) -> str:
    if b"\0" in line:
        raise RowError(f"NUL byte at byte {line.index(0) + 1}")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start + 1}") from error


def _read_jsonl(path: Path, name: str) -> Records:
    with path.open("rb") as file:
        for number, line in _lines(file):
            where = f"{name}:{number}"
            if isinstance(line, RowError):
                yield line, where
            elif line.strip():
                try:
                    yield strict_json(_text(line)), where
                except RowError as error:
                    yield error, where


def _read_json(path: Path, name: str) -> Records:
    """A JSON array of records; a file that is one record a line after all is read as such."""
    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise DataError(f"{name}: a JSON array of more than 1 GiB; save it as JSONL, one record a line")
    content = path.read_bytes().removeprefix(BOM)
    try:
        text = _text(content)
    except RowError as error:
        raise DataError(f"{name}: {error}") from error
    if not _is_array_of_records(text):
        yield from _read_jsonl(path, name)
        return
    position, line, seen = text.index("[") + 1, 1, 0
    while True:
        position = _skip_space(text, position)
        if text[position : position + 1] == "]":
            break
        line += text.count("\n", seen, position)
        seen = position
        where = f"{name}:{line}"
        try:
            record, position = _record_at(text, position)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
            ) from error
        except RecursionError as error:
            raise DataError(f"{where}: nested too deep") from error
        yield record, where
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            raise DataError(f"{name}:{line + text.count(chr(10), seen, position)}: not JSON: expected , or ]")


def _record_at(text: str, position: int) -> tuple[Any, int]:
    """The record that begins there, or the RowError that says why it cannot be used, and where it ends."""
    try:
        return _DECODER.raw_decode(text, position)
    except RowError as error:
        return error, _LENIENT_DECODER.raw_decode(text, position)[1]


def _is_array_of_records(text: str) -> bool:
    """Whether the file is one array. A bare list of turns a line starts with [ too, but then more lists follow."""
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith("[") or not rest.strip():
        return first.startswith("[")
    try:
        strict_json(first)
    except RowError:
        return True
    return False


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _read_csv(path: Path, name: str) -> Records:
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open("rb") as file:
        reader = csv.reader((_csv_text(line) for _, line in _lines(file)), strict=True)
        header: list[str] | None = None
        while True:
            where = f"{name}:{reader.line_num + 1}"
            try:
                row = next(reader, None)
            except (csv.Error, RowError) as error:
                raise DataError(f"{where}: {error}") from error
            if row is None:
                return
            if header is None:
                header = row
                if len(set(header)) < len(header):
                    raise DataError(f"{where}: two columns have the same name")
            elif len(row) != len(header) and row:
                yield RowError(f"{len(row)} fields where the header has {len(header)}"), where
            elif row:
                yield {column: value for column, value in zip(header, row, strict=True) if value}, where


def _csv_text(line: bytes | RowError) -> str:
    if isinstance(line, RowError):
        raise line
    return _text(line) + "\n"


def _read_parquet(path: Path, name: str) -> Records:
    import pyarrow  # type: ignore[import-untyped]  # it ships no types
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(path)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        unpacked = sum(group.total_byte_size for group in groups)
        if unpacked > MAX_PARQUET_RATIO * max(path.stat().st_size, MAX_LINE_BYTES):
            raise DataError(f"{name}: unpacks to more than {MAX_PARQUET_RATIO} times its size")
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield _parquet_row(row), f"{name}:{number}"
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name}: not a whole Parquet file: {str(error).splitlines()[0]}") from error


def _parquet_row(row: dict[str, Any]) -> Any:
    """The row with dates and decimals as text; RowError where it has something JSON would not hold."""
    try:
        return _plain(row)
    except RowError as error:
        return error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"the number {value}, which is not finite")
    if isinstance(value, bytes):
        raise RowError("binary data in a row")
    return value if isinstance(value, str | int | float | type(None)) else str(value)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"the name {twice!r} occurs twice in one object", field=twice)
    return record


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise RowError(f"the number {text} is too large")
    return number


def _int(text: str) -> int:
    if len(text) > 4300:
        raise RowError(f"a whole number of {len(text)} digits")
    return int(text)


def _constant(text: str) -> Any:
    raise RowError(f"{text} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_float=_float, parse_int=_int, parse_constant=_constant
)
_LENIENT_DECODER = json.JSONDecoder(parse_int=str)
"""Finds the end of a record that is JSON, but not as strict as we want it."""

READERS: dict[str, Callable[[Path, str], Records]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
