"""Every benchmark, one after the other: `python benchmarks/run_all.py --peer-python /path/to/python/with/trl`.

    each benchmark's script --JSON--> results.json --> tables of docs/benchmarks.md and the READMEs

Results are written after each benchmark, so that a run that was stopped goes on where it was: what was measured on this
machine with these versions is kept, unless --again. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import llama_cpp
import tables

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A script with its arguments; `seconds` is how long three rounds took on two cores of an AMD EPYC."""

    name: str
    title: str
    arguments: list[str]
    seconds: float
    ours: str = "kitae"
    has_peer_python: bool = True
    needs_llama: bool = False


FEW = ["--steps", "10", "--warmup", "3"]
ALL = [
    Benchmark("startup", "Start to the end of the first SFT step", ["startup.py"], 60),
    Benchmark("sft", "SFT, 5 M parameters", ["sft.py", *FEW], 170),
    Benchmark("sft-lora", "LoRA SFT, rank 16", ["sft.py", "--lora-rank", "16", *FEW], 170),
    Benchmark(
        "sft-150k",
        "SFT, vocabulary 151,936",
        [
            "sft.py",
            "--size",
            "42m-150k",
            "--peers",
            "trl",
            "trl-packed-best",
            "--steps",
            "3",
            "--warmup",
            "1",
        ],
        360,
    ),
    Benchmark(
        "sft-moe",
        "SFT, DeepSeek-V3-like mixture of experts",
        ["sft.py", "--size", "13m-moe", "--peers", "trl", "trl-packed-best", *FEW],
        170,
    ),
    Benchmark("dpo", "DPO", ["dpo.py", "--steps", "9", "--warmup", "3"], 150),
    Benchmark("grpo", "GRPO, whole step", ["grpo.py", "--steps", "4", "--warmup", "1"], 280),
    Benchmark(
        "rollout-bfloat16",
        "Rollouts, bfloat16",
        ["rollout.py", "--dtypes", "bfloat16"],
        520,
        ours="native",
        has_peer_python=False,
        needs_llama=True,
    ),
    Benchmark(
        "rollout-float32",
        "Rollouts, float32",
        ["rollout.py", "--dtypes", "float32", "--engines", "native", "generate", "llama.cpp"],
        380,
        ours="native",
        has_peer_python=False,
        needs_llama=True,
    ),
    *(
        Benchmark(
            f"stream-{dtype}",
            f"One completion at a time, {dtype}",
            ["stream.py", "--dtypes", dtype],
            40,
            has_peer_python=False,
            needs_llama=True,
        )
        for dtype in ("bfloat16", "float32")
    ),
    *(
        Benchmark(
            f"serving-{streams}",
            f"Serving, {streams} chat{'s' if streams > 1 else ''} at a time, bfloat16",
            ["serve.py", "--streams", str(streams)],
            seconds,
            has_peer_python=False,
            needs_llama=True,
        )
        for streams, seconds in ((1, 80), (16, 110), (64, 220))
    ),
    Benchmark("export-fp8", "FP8 to BF16", ["export_fp8.py"], 90, has_peer_python=False),
    Benchmark("export-merge", "Merging an adapter", ["export_merge.py"], 60, has_peer_python=False),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[b.name for b in ALL], help="default: all of them")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each contender")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument(
        "--results", type=Path, default=tables.RESULTS, help="another file leaves the pages alone"
    )
    options = parser.parse_args()

    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    chosen = [b for b in ALL if options.only is None or b.name in options.only]
    todo = [b for b in chosen if options.again or not is_current(results.get(b.name))]
    for benchmark in chosen:
        if benchmark not in todo:
            measured_on = results[benchmark.name]["machine"]["date"]
            print(f"{benchmark.name}: measured on {measured_on}, kept; --again measures anew", flush=True)
    if any(b.needs_llama for b in todo):
        llama_cpp.build()

    started, failed = time.monotonic(), []
    for number, benchmark in enumerate(todo):
        left = sum(expected_s(b, results, rounds=options.rounds) for b in todo[number:])
        print(
            f"\n[{number + 1}/{len(todo)}] {benchmark.name}: {benchmark.title}; {left / 60:.0f} min left",
            flush=True,
        )
        result = measure(benchmark, rounds=options.rounds, peer_python=options.peer_python)
        if result is None:
            failed.append(benchmark.name)
            continue
        results[benchmark.name] = result
        in_order = {b.name: results[b.name] for b in ALL if b.name in results}
        options.results.write_text(json.dumps(in_order, indent=1) + "\n")
        if options.results == tables.RESULTS:
            tables.main()
    print(f"\n{len(todo) - len(failed)} measured in {(time.monotonic() - started) / 60:.0f} min", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries these again")


def is_current(result: dict[str, Any] | None) -> bool:
    """Whether it was measured on this machine and with these versions."""
    here = {key: value for key, value in harness.machine().items() if key != "date"}
    return result is not None and all(result["machine"].get(key) == value for key, value in here.items())


def expected_s(benchmark: Benchmark, results: dict[str, Any], *, rounds: int) -> float:
    """As long as it took before, here if it was measured here."""
    before = results.get(benchmark.name)
    return benchmark.seconds * rounds / 3 if before is None else before["seconds"] * rounds / before["rounds"]


def measure(benchmark: Benchmark, *, rounds: int, peer_python: str) -> dict[str, Any] | None:
    """Run one benchmark, its output shown; None where it failed."""
    script, *arguments = benchmark.arguments
    shown = f"python benchmarks/{script} {' '.join(arguments)} --rounds {rounds}".replace("  ", " ")
    command = [sys.executable, str(HERE / script), *arguments, "--rounds", str(rounds)]
    if benchmark.has_peer_python:
        command += ["--peer-python", peer_python]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as folder:
        path = Path(folder) / "result.json"
        if subprocess.run([*command, "--json", str(path)]).returncode != 0:
            return None
        report = json.loads(path.read_text())
    return {
        "title": benchmark.title,
        "command": shown,
        "unit": report["unit"],
        "ours": benchmark.ours,
        "against": report["comparisons"],
        "floor": report["floor"],
        "notes": report.get("notes", []),
        "machine": report["machine"],
        "versions": report["versions"] or report["machine"]["packages"],
        "rounds": rounds,
        "other_cores": report["other_cores"],
        "disturbed": report["other_cores"] > harness.QUIET,
        "seconds": time.monotonic() - started,
    }


if __name__ == "__main__":
    main()
