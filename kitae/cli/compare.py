"""Compare two models on the same problems: kitae compare A B, results files of kitae evaluate or models."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kitae.cli import _help, evaluate
from kitae.cli._open import warn_on_stderr
from kitae.cli._output import write_json
from kitae.config import Section
from kitae.settings import read

if TYPE_CHECKING:
    from kitae.evaluate.compare import Comparison

_AFTER = (
    "Models are named in place of files with --dataset_name and the other settings of kitae evaluate, which then "
    "evaluates both."
)


class Settings(Section):
    """Compare two evaluations of the same problems."""

    first: str
    """Results file (.jsonl) of one model."""
    second: str
    """Results file of the other, evaluated on the same data."""
    json_file: str | None = None
    """Also write the comparison to this file as JSON (--json FILE)."""


def main(argv: list[str]) -> int:
    """Print the paired comparison of two results files, or of two models evaluated now."""
    if _help.is_asked(argv):
        _help.show(Settings, prog="kitae compare FIRST SECOND", after=_AFTER)
        return 0
    names = argv[:2]
    if len(names) == 2 and not any(name.startswith("-") or name.endswith(".jsonl") for name in names):
        return evaluate.main([names[1], "--baseline", names[0], *argv[2:]])
    chosen, notes = read("compare", Settings, argv, positional=("first", "second"))
    warn_on_stderr(notes.warnings)

    from kitae.evaluate.compare import compare
    from kitae.evaluate.records import read_records

    comparison = compare(read_records(Path(chosen.first)), read_records(Path(chosen.second)))
    print(text_of(comparison, first=chosen.first, second=chosen.second))
    if chosen.json_file:
        write_json(
            chosen.json_file, {**chosen.model_dump(exclude={"json_file"}), "comparison": asdict(comparison)}
        )
    return 0


def text_of(found: Comparison, *, first: str, second: str) -> str:
    """The comparison for a reader."""
    width = max(len(first), len(second))
    unpaired = f" ({found.unpaired} more have no partner)" if found.unpaired else ""
    return "\n".join(
        [
            f"{first:<{width}}  accuracy {found.first:.3f}, alone better on {found.first_better}",
            f"{second:<{width}}  accuracy {found.second:.3f}, alone better on {found.second_better}",
            f"difference {found.difference:+.3f} (95 % {found.low:+.3f} to {found.high:+.3f}), "
            f"p = {found.p_value:.3g} (exact McNemar), {found.problems} problems{unpaired}",
        ]
    )
