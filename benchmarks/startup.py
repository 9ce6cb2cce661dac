"""From command to first step: `python benchmarks/startup.py --peer-python /path/to/python/with/trl`.

kitae, TRL and transformers' Trainer each fine-tune the same small model on the same chat rows, alternately, each in a
process of its own; printed are seconds from the process's start to the end of its first optimizer step, with the imports
that none of them can avoid beside them. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import harness
from harness import Contender, Measurement

HERE = Path(__file__).resolve().parent
TARGETS = {"trl": (round(1 / 0.6, 2), None)}
"""At size 5m kitae is to need at most 0.6 of a peer's seconds."""
LIMIT_S = 4.0
"""What kitae is to need at size 5m."""
KEY = "first_step_s"


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as temporary:
        folder = options.keep or Path(temporary)
        rows = str(8 * options.batch_size)
        script = str(HERE / "chat_workload.py")
        command = [sys.executable, script, str(folder), "--size", options.size, "--rows", rows]
        workload = harness.measure(Contender("workload", command)).values
        measured = harness.run_rounds(contenders(folder, options), rounds=options.rounds)
    report(measured, workload=workload, options=options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--peers", nargs="*", choices=["trl", "trainer"], default=["trl", "trainer"])
    parser.add_argument("--size", choices=["5m", "30m", "tiny"], default="5m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--keep", type=Path, help="folder for model, rows and runs, kept (default: a temporary one)"
    )
    return parser.parse_args()


def contenders(folder: Path, options: argparse.Namespace) -> list[Contender]:
    env = harness.thread_env(options.threads)
    shared = ["--folder", str(folder), "--batch-size", str(options.batch_size)]
    ours = [sys.executable, str(HERE / "startup_kitae.py")]
    theirs = [options.peer_python, str(HERE / "startup_peers.py")]
    return [
        Contender("imports", [*ours, "--only-imports", *shared], env),
        Contender("kitae", [*ours, *shared], env),
        *(Contender(name, [*theirs, "--peer", name, *shared], env) for name in options.peers),
    ]


def report(
    measured: dict[str, list[Measurement]], *, workload: dict[str, float], options: argparse.Namespace
) -> None:
    print(
        f"start to the end of the first SFT step: {workload['parameters'] / 1e6:.1f} M parameters, "
        f"{options.batch_size} rows a step, {options.threads} threads, {options.rounds} rounds"
    )
    harness.print_machine(measured)
    for name, runs in measured.items():
        print(f"{name}: {runs[0].values['versions']}")
    targets = TARGETS if options.size == "5m" else {}
    comparisons = harness.compare(measured, key=KEY, is_time=True, targets=targets)
    harness.print_comparisons(comparisons, unit="seconds", digits=2)
    ours = harness.spread(measured["kitae"], KEY).median
    imports = harness.spread(measured["imports"], KEY).median
    print(
        f"kitae: {ours:.2f} s (to reach at 5m: {LIMIT_S:g}); "
        f"importing torch and the model's file alone takes {imports:.2f}"
    )
    if options.json:
        harness.write_json(
            options.json, measured=measured, comparisons=comparisons, unit="s", workload=workload
        )


if __name__ == "__main__":
    main()
