"""DPO against TRL: `python benchmarks/dpo.py --peer-python /path/to/python/with/trl`.

Both train the same model on the same preference pairs, alternately, each measurement in a process of its own. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import harness
import sft
from harness import Contender, Measurement

HERE = Path(__file__).resolve().parent
PEERS = {"trl": [], "trl-best": ["--gradient-checkpointing", "off"]}
"""TRL as it comes; and without recomputing activations."""
TARGETS = {"trl": (5.0, 0.35), "trl-best": (5.0, 0.35)}
"""What kitae is to reach at size 5m, fully trained: times a peer's pairs per second, share of its peak memory."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--precision", choices=["same", "default", "float32", "bfloat16"], default="same")
    parser.add_argument("--size", choices=["5m", "30m", "tiny"], default="5m")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument(
        "--lora-rank", type=int, default=0, help="LoRA of all linear layers instead of full training"
    )
    options = parser.parse_args()
    if not 0 < options.warmup < options.steps:
        parser.error(f"--warmup {options.warmup} must be at least 1 and below --steps {options.steps}")
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as temporary:
        folder = Path(temporary)
        workload = sft.make_workload(folder, options)
        if options.precision == "same":
            options.precision = "bfloat16" if workload["fast_bfloat16"] else "float32"
        flags = sft.shared_flags(folder, options)
        env = harness.thread_env(options.threads)
        contenders = [Contender("kitae", [sys.executable, str(HERE / "dpo_kitae.py"), *flags], env)]
        for name in options.peers:
            command = [options.peer_python, str(HERE / "dpo_trl.py"), *PEERS[name], *flags]
            contenders.append(Contender(name, command, env))
        measured = harness.run_rounds(contenders, rounds=options.rounds)
    report(measured, options=options)


def report(measured: dict[str, list[Measurement]], *, options: argparse.Namespace) -> None:
    training = f"LoRA r {options.lora_rank}, all linear layers" if options.lora_rank else "full"
    print(
        f"DPO, {training}: {options.batch_size} pairs a step, {options.steps - options.warmup} steps after "
        f"{options.warmup}; precision {options.precision}, {options.threads} threads, {options.rounds} rounds"
    )
    harness.print_machine(measured)
    targets = TARGETS if options.size == "5m" and not options.lora_rank else {}
    comparisons = harness.compare(measured, key="pairs_per_s", targets=targets)
    harness.print_comparisons(comparisons, unit="pairs/s", digits=2)
    if options.json:
        harness.write_json(options.json, measured=measured, comparisons=comparisons, unit="pairs/s")
    sft.check_losses(measured)


if __name__ == "__main__":
    main()
