"""Run commands alternately, each measurement in a process of its own, and print medians, spreads and ratios.

    contenders --rounds, alternately--> child process --last stdout line, JSON--> Measurement --> Summary --> table, file

A child prints its numbers as one JSON object on its last line of stdout. Peak memory is the kernel's own figure for
the child (ru_maxrss). This file imports the standard library only, at first: a child's peak can never be below its parent's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

QUIET = 0.15
"""Cores that other processes may take before a measurement is called disturbed."""
KEEP_LINES = 30
"""Lines of a failed child's output that are shown."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A command to measure; `env` is added to this process's environment."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one contender: what it printed, and what the kernel says about it."""

    values: dict[str, Any]
    peak_rss_mib: float
    wall_s: float
    other_cores: float | None
    """Cores that everything else on the machine kept busy meanwhile; None where /proc does not tell."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Comparison:
    """kitae beside one peer: a line of the tables in docs/benchmarks.md, and an entry of results.json."""

    ours: Spread
    theirs: Spread
    ratio: Spread
    """How many times as fast kitae is, round by round: above 1 it is faster, whatever the unit."""
    our_memory_mib: Spread
    their_memory_mib: Spread
    memory_ratio: Spread
    """kitae's peak memory over the peer's."""
    target: float | None = None
    """The ratio that is to be reached."""
    memory_target: float | None = None


class ChildError(Exception):
    """A measured command failed or printed no JSON line."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each contender")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of every contender")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")


def run_rounds(contenders: Sequence[Contender], *, rounds: int) -> dict[str, list[Measurement]]:
    """Measure every contender once per round; every second round goes backwards, so that drift hits all alike."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that measure() ends its child
    measured: dict[str, list[Measurement]] = {c.name: [] for c in contenders}
    for number in range(rounds):
        for contender in contenders[:: -1 if number % 2 else 1]:
            measurement = measure(contender)
            measured[contender.name].append(measurement)
            print(
                f"round {number + 1}/{rounds}  {contender.name}: {_shown(measurement)}",
                file=sys.stderr,
                flush=True,
            )
    return measured


def measure(contender: Contender) -> Measurement:
    """Run the command in a child process of its own, to its end."""
    started, busy = time.perf_counter(), _busy_core_seconds()
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            contender.command, stdout=printed, stderr=errors, env={**os.environ, **contender.env}
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)  # Popen.wait does not tell the child's peak memory
        except BaseException:  # Ctrl-C and SIGTERM too: no measurement goes on unseen
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        wall_s, busy_after = time.perf_counter() - started, _busy_core_seconds()
        printed.seek(0)
        errors.seek(0)
        output = printed.read()
        values = _last_json(output) if child.returncode == 0 else None
        if values is None:
            tail = "\n".join((output + errors.read()).splitlines()[-KEEP_LINES:])
            raise ChildError(f"{contender.name} ended with {child.returncode} and no JSON line:\n{tail}")
    other_cores = None
    if busy is not None and busy_after is not None:
        other_cores = max(0.0, busy_after - busy - usage.ru_utime - usage.ru_stime) / wall_s
    bytes_per_unit = 1 if sys.platform == "darwin" else 2**10
    return Measurement(values, usage.ru_maxrss * bytes_per_unit / 2**20, wall_s, other_cores)


def spread(measurements: Sequence[Measurement], key: str) -> Spread:
    """Spread of a printed number, or of peak_rss_mib, wall_s."""
    return Spread.of([_value(m, key) for m in measurements])


def ratio(ours: Sequence[Measurement], theirs: Sequence[Measurement], key: str) -> Spread:
    """Spread over rounds of ours / theirs of the same round."""
    return Spread.of([_value(a, key) / _value(b, key) for a, b in zip(ours, theirs, strict=True)])


def compare(
    measured: Mapping[str, Sequence[Measurement]],
    *,
    key: str,
    ours: str = "kitae",
    memory: str = "peak_rss_mib",
    is_time: bool = False,
    targets: Mapping[str, tuple[float | None, float | None]] | None = None,
) -> dict[str, Comparison]:
    """`ours` beside every other contender, by the printed number `key`; `is_time` says that less is better.

    `memory` names the memory that is compared. `targets` has the ratio and the share of memory to reach, by contender.
    """
    runs = measured[ours]
    found = {}
    for name, others in measured.items():
        if name == ours:
            continue
        fast, small = (targets or {}).get(name, (None, None))
        found[name] = Comparison(
            ours=spread(runs, key),
            theirs=spread(others, key),
            ratio=ratio(others, runs, key) if is_time else ratio(runs, others, key),
            our_memory_mib=spread(runs, memory),
            their_memory_mib=spread(others, memory),
            memory_ratio=ratio(runs, others, memory),
            target=fast,
            memory_target=small,
        )
    return found


def device_memory(device: str) -> dict[str, float]:
    """What a child adds to its numbers at its end: the most memory that torch took from a GPU, where it ran on one."""
    if device != "cuda":
        return {}
    import torch

    return {"peak_gpu_mib": torch.cuda.max_memory_reserved() / 2**20}


def memory_key(device: str) -> str:
    """The memory to compare: the device's own."""
    return "peak_gpu_mib" if device == "cuda" else "peak_rss_mib"


def gpu() -> str | None:
    """The first GPU's name, where there is one."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(found.stdout.splitlines()), "").strip() or None


def disturbance(measured: Mapping[str, Sequence[Measurement]]) -> float:
    """The most cores that anything else kept busy during one measurement; 0 where unknown."""
    return max((m.other_cores or 0.0 for runs in measured.values() for m in runs), default=0.0)


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "gpu": gpu(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("kitae", "torch", "transformers", "peft")},
        "date": datetime.now(UTC).date().isoformat(),
    }


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_env(threads: int) -> dict[str, str]:
    """Environment in which numeric libraries use that many threads."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, columns aligned: it reads well in a terminal and can be pasted into a page."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * w for w in widths], *rows):
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("| " + " | ".join(cells) + " |")


def print_comparisons(
    comparisons: Mapping[str, Comparison], *, unit: str, ours: str = "kitae", digits: int = 0
) -> None:
    """One line for kitae and one for every peer, with the targets."""
    first = next(iter(comparisons.values()))
    rows = [[ours, show(first.ours, digits=digits), show(first.our_memory_mib), "", "", "", ""]]
    for name, c in comparisons.items():
        rows.append(
            [
                name,
                show(c.theirs, digits=digits),
                show(c.their_memory_mib),
                show(c.ratio, digits=2),
                "" if c.target is None else f">= {c.target:g}",
                show(c.memory_ratio, digits=2),
                "" if c.memory_target is None else f"<= {c.memory_target:g}",
            ]
        )
    print_table(["", unit, "peak MiB", f"{ours} speed", "target", f"{ours} memory", "target"], rows)


def print_machine(measured: Mapping[str, Sequence[Measurement]]) -> None:
    """One line on the machine, and a warning where something else was running on it."""
    about = machine()
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    with_gpu = f", {about['gpu']}" if about["gpu"] else ""
    print(
        f"{about['cpu']}, {about['cores']} cores{with_gpu}; Python {about['python']}, {packages}; {about['date']}"
    )
    if (worst := disturbance(measured)) > QUIET:
        print(
            f"NOT QUIET: other processes kept up to {worst:.2f} cores busy; repeat before quoting these numbers"
        )


def write_json(
    path: Path,
    *,
    measured: Mapping[str, Sequence[Measurement]],
    comparisons: Mapping[str, Comparison],
    unit: str,
    floor: Mapping[str, Any] | None = None,
    **also: Any,
) -> None:
    """Everything measured, with the machine it was measured on.

    A `floor` says `what` bounds the speed, its `limit` in the same unit, and kitae's `share` of it.
    """
    versions: dict[str, str] = {}
    for runs in measured.values():
        versions |= runs[0].values.get("versions", {})
    report = {
        "machine": machine(),
        "versions": versions,
        "other_cores": disturbance(measured),
        "unit": unit,
        "comparisons": {name: asdict(comparison) for name, comparison in comparisons.items()},
        "floor": floor,
        **also,
        "measurements": {name: [asdict(m) for m in runs] for name, runs in measured.items()},
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def show(value: Spread, *, digits: int = 0) -> str:
    """`median (low-high)`."""
    return f"{value.median:,.{digits}f} ({value.low:,.{digits}f}-{value.high:,.{digits}f})"


def _shown(measurement: Measurement) -> str:
    numbers = {k: v for k, v in measurement.values.items() if isinstance(v, int | float)}
    shown = [f"{key} {value:,.4g}" for key, value in numbers.items()]
    others = "" if measurement.other_cores is None else f", others {measurement.other_cores:.2f} cores"
    return f"{', '.join(shown)}, peak {measurement.peak_rss_mib:,.0f} MiB, {measurement.wall_s:.1f} s{others}"


def _value(measurement: Measurement, key: str) -> float:
    return float(measurement.values[key] if key in measurement.values else getattr(measurement, key))


def _last_json(output: str) -> dict[str, Any] | None:
    lines = output.strip().splitlines()
    try:
        values = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return values if isinstance(values, dict) else None


def _busy_core_seconds() -> float | None:
    """CPU seconds the whole machine has spent working since it started; None where /proc does not tell."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def median_seconds(work: Callable[[], object], *, repeats: int) -> float:
    """Median seconds of `work`, after once that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
