"""The gate that an export passes before it gets its name.

NAME.partial --check--> passed: NAME    failed: NAME.rejected, and what had the name before keeps it

The report is kitae_verify.json in an exported folder, and FILE.verify.json beside a file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kitae.errors import GateError
from kitae.export.disk import os_errors
from kitae.train.files import finite, sync_folder, write_json

REPORT = "kitae_verify.json"
"""What the gate found; it holds for one export only."""
REJECTED = ".rejected"

Check = Callable[[Path, str], dict[str, Any]]
"""Compares what lies at a path with what it was made of; the name is what the export is to be called.

Its report is that of verify.verify.
"""


def examine(check: Check | None, written: Path, output: Path) -> dict[str, Any] | None:
    """The report on an export that is whole and has no name yet; None where there is no check.

    One that fails becomes OUTPUT.rejected, and GateError says so.
    """
    if check is None:
        return None
    report = check(written, output.name)
    if not report["passed"]:
        rejected = output.with_name(output.name + REJECTED)
        with os_errors(rejected):
            _rename(written, rejected)
        path = save(report, rejected)
        raise GateError(
            f"{output.name} failed the gate: {first_failure(report)}; it is {rejected} now, the report {path}"
        )
    return report


def _rename(written: Path, rejected: Path) -> None:
    """Give a file or folder its name, which an earlier one of the name loses."""
    if rejected.is_dir():
        shutil.rmtree(rejected)
    else:
        rejected.unlink(missing_ok=True)
    if written.is_dir():
        (written / "lock").unlink(missing_ok=True)
    written.replace(rejected)
    sync_folder(rejected.parent)


def report_of(output: Path) -> Path:
    """Where an export's report lies."""
    return output / REPORT if output.is_dir() else output.with_name(f"{output.name}.verify.json")


def save(report: Mapping[str, Any], output: Path) -> Path:
    """Write the report into an exported folder, or beside a file."""
    path = report_of(output)
    with os_errors(path):
        write_json(path, finite(report))
    return path


def first_failure(report: Mapping[str, Any]) -> str:
    """The first of a report's failures, and how many more there are."""
    failures: list[str] = [failure for row in report["rows"] for failure in row["failures"]]
    return failures[0] + (f" (and {len(failures) - 1} more)" if len(failures) > 1 else "")
