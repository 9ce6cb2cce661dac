"""The gate on the command line: the table of an export's comparison, and what becomes of one that fails it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kitae.errors import GateError

REJECTED = ".rejected"


def check(
    reference: str, output: Path, *, base: str | None, dequantize: bool, threads: int
) -> dict[str, Any]:
    """Compare what was just written with what it was made of; a failure takes its name away and raises GateError."""
    from kitae.export.verify import verify

    try:
        report = verify(reference, [output], base=base, dequantize=dequantize, threads=threads)
    except BaseException:
        print(
            f"kitae: {output} is whole, but was not checked; kitae export verify does that", file=sys.stderr
        )
        raise
    return _settle(report, output)


def check_adapter(reference: str, output: Path, *, base: str | None) -> dict[str, Any]:
    """The same for the GGUF file of an adapter alone."""
    from kitae.export.verify import verify_adapter

    return _settle(verify_adapter(reference, output, base=base), output)


def _settle(report: dict[str, Any], output: Path) -> dict[str, Any]:
    from kitae.export.verify import save

    path = save(report, output)
    if report["passed"]:
        return report
    print(text_of(report), file=sys.stderr)
    rejected = output.with_name(output.name + REJECTED)
    if rejected.is_dir():
        shutil.rmtree(rejected)
    else:
        rejected.unlink(missing_ok=True)
    output.replace(rejected)
    where = path if path.exists() else rejected / path.name
    raise GateError(
        f"{output.name} failed the gate: {_first(report)}; it is {rejected} now, the report {where}"
    )


def compare(
    reference: str,
    candidates: Sequence[str],
    *,
    base: str | None,
    dequantize: bool,
    threads: int,
    prompts: Sequence[str] | None,
) -> dict[str, Any]:
    """Compare exports with what they were made of."""
    from kitae.export.verify import PROMPTS, verify

    return verify(
        reference, candidates, base=base, dequantize=dequantize, threads=threads, prompts=prompts or PROMPTS
    )


def require_passed(report: Mapping[str, Any]) -> None:
    """Raise GateError for a comparison that found something wrong."""
    if not report["passed"]:
        names = ", ".join(row["name"] for row in report["rows"] if row["failures"])
        raise GateError(f"{names} failed the gate: {_first(report)}")


def _first(report: Mapping[str, Any]) -> str:
    failures: list[str] = [failure for row in report["rows"] for failure in row["failures"]]
    return failures[0] + (f" (and {len(failures) - 1} more)" if len(failures) > 1 else "")


def text_of(report: Mapping[str, Any]) -> str:
    """The table, and under it what is wrong."""
    head = [
        "",
        "type",
        "run by",
        "max |d|",
        "mean |d|",
        "KL",
        "max KL",
        "same top",
        "same text",
        "tensors",
        "adapter",
    ]
    lines = [head] + [_line(row) for row in report["rows"]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    if report["not_run"]:
        table.append(f"not run, only tensors compared: {report['not_run']}")
    else:
        table.append(
            f"{len(report['prompts'])} prompts, {report['positions']} positions; |d| of log-probabilities"
        )
    for row in report["rows"]:
        table += [f"FAILED {row['name']}: {failure}" for failure in row["failures"][:5]]
        if len(row["failures"]) > 5:
            table.append(f"FAILED {row['name']}: and {len(row['failures']) - 5} more")
    return "\n".join(table)


def _line(row: Mapping[str, Any]) -> list[str]:
    tensors = row["tensors"]
    share = None if tensors is None else tensors["adapter_share"]
    return [
        row["name"],
        row["kind"],
        row["how"],
        *(_number(row[key]) for key in ("max_logit", "mean_logit", "kl_mean", "kl_max")),
        *("" if row[key] is None else f"{row[key]:.0%}" for key in ("same_top", "same_text")),
        "" if tensors is None else f"{tensors['count']}, worst {tensors['worst_error']:.2g}",
        "" if share is None else f"{share:.0%}",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
