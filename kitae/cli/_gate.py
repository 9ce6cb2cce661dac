"""The gate on the command line: the table of an export's comparison, and what becomes of one that fails it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kitae.errors import GateError
from kitae.export.gate import Check, first_failure

SECONDS_BETWEEN_LINES = 10.0


def checker(
    reference: str,
    *,
    base: str | None,
    dequantize: bool,
    threads: int,
    before: Callable[[], None] | None = None,
) -> Check:
    """What an export has to pass; `before` is called first. A table of what is wrong goes to standard error."""

    def check(written: Path, name: str) -> dict[str, Any]:
        from kitae.export.verify import verify

        if before is not None:
            before()
        try:
            with told() as say:
                report = verify(
                    reference,
                    [written],
                    names=[name],
                    base=base,
                    dequantize=dequantize,
                    threads=threads,
                    say=say,
                )
        except BaseException:
            print(
                f"kitae: {written} is whole, but was not checked; the same command does that, and with --no_verify "
                f"it becomes {name} as it is",
                file=sys.stderr,
            )
            raise
        if not report["passed"]:
            print(text_of(report), file=sys.stderr)
        return report

    return check


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

    with told() as say:
        return verify(
            reference,
            candidates,
            base=base,
            dequantize=dequantize,
            threads=threads,
            prompts=prompts or PROMPTS,
            say=say,
        )


@contextmanager
def told(*, every_s: float = SECONDS_BETWEEN_LINES) -> Iterator[Callable[[str], None]]:
    """What a comparison is at, every ten seconds on standard error: of a large model it takes many minutes."""
    ended, began = threading.Event(), time.monotonic()
    now = ["it begins"]

    def tell() -> None:
        while not ended.wait(every_s):
            print(f"kitae: comparing for {time.monotonic() - began:.0f} s: {now[0]}", file=sys.stderr)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield lambda what: now.__setitem__(0, what)
    finally:
        ended.set()
        teller.join()


def require_passed(report: Mapping[str, Any]) -> None:
    """Raise GateError for a comparison that found something wrong."""
    if not report["passed"]:
        names = ", ".join(row["name"] for row in report["rows"] if row["failures"])
        raise GateError(f"{names} failed the gate: {first_failure(report)}")


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
        table.append(f"the original was not run: {report['not_run']}")
    else:
        table.append(
            f"{len(report['prompts'])} prompts, {report['positions']} positions; |d| of log-probabilities"
        )
    for row in report["rows"]:
        if row["not_checked"]:
            table.append(f"not checked of {row['name']}: {'; '.join(row['not_checked'])}")
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
