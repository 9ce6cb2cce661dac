"""Whole GRPO steps against TRL: `python benchmarks/grpo.py --peer-python /path/to/python/with/trl`.

Both sample completions of the same prompts from the same model, judge them by the same function and update the weights,
alternately, each measurement in a process of its own. See docs/benchmarks.md.
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
PEERS = {
    "trl": [],
    "trl-best": ["--gradient-checkpointing", "off"],
    "trl-liger": ["--liger"],
    "trl-liger-best": ["--gradient-checkpointing", "off", "--liger"],
}
"""TRL as it comes; without recomputing activations; and both with Liger's kernels."""
TARGETS = {"trl": (12.0, 0.35), "trl-best": (12.0, 0.35)}
"""What kitae is to reach at size 5m, fully trained: times a peer's tokens per second, share of its peak memory."""
STANDARD_ERRORS = 3.0
"""Apart so far, mean completion lengths say that the sides did not do the same work."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["trl", "trl-best"])
    parser.add_argument("--precision", choices=["same", "default", "float32", "bfloat16"], default="same")
    parser.add_argument("--size", choices=["5m", "30m", "1.5b", "tiny"], default="5m")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--longest", type=int, default=256, help="most tokens of a completion")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument(
        "--lora-rank", type=int, default=0, help="LoRA of all linear layers instead of full training"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    if not 0 < options.warmup < options.steps:
        parser.error(f"--warmup {options.warmup} must be at least 1 and below --steps {options.steps}")
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as temporary:
        folder = Path(temporary)
        options.batch_size = options.prompts
        workload = sft.make_workload(folder, options, device=options.device)
        if options.precision == "same":
            options.precision = "bfloat16" if workload["fast_bfloat16"] else "float32"
        env = harness.thread_env(options.threads)
        flags = shared_flags(folder, options)
        contenders = [Contender("kitae", [sys.executable, str(HERE / "grpo_kitae.py"), *flags], env)]
        for name in options.peers:
            command = [options.peer_python, str(HERE / "grpo_trl.py"), *PEERS[name], *flags]
            contenders.append(Contender(name, command, env))
        measured = harness.run_rounds(contenders, rounds=options.rounds)
    report(measured, options=options)


def shared_flags(folder: Path, options: argparse.Namespace) -> list[str]:
    names = ("precision", "prompts", "group", "longest", "steps", "warmup", "lora-rank", "device")
    named = {"folder": folder} | {name: getattr(options, name.replace("-", "_")) for name in names}
    return sft.as_flags(named)


def report(measured: dict[str, list[Measurement]], *, options: argparse.Namespace) -> None:
    training = f"LoRA r {options.lora_rank}, all linear layers" if options.lora_rank else "full"
    print(
        f"GRPO, {training}: {options.prompts} prompts x {options.group} completions of at most {options.longest} tokens "
        f"a step, {options.steps - options.warmup} steps after {options.warmup}; precision {options.precision}, "
        f"{options.threads} threads, {options.rounds} rounds"
    )
    harness.print_machine(measured)
    lengths = {name: harness.spread(runs, "completion_length") for name, runs in measured.items()}
    print("mean completion: " + ", ".join(f"{name} {harness.show(x)} tokens" for name, x in lengths.items()))
    targets = TARGETS if options.size == "5m" and not options.lora_rank else {}
    memory = harness.memory_key(options.device)
    comparisons = harness.compare(measured, key="tokens_per_s", memory=memory, targets=targets)
    harness.print_comparisons(comparisons, unit="tokens/s")
    if options.json:
        harness.write_json(options.json, measured=measured, comparisons=comparisons, unit="tokens/s")
    ours = lengths["kitae"].median
    # Lengths are geometric, whose standard deviation is about their mean; the rounds of one side have the same completions.
    completions = options.prompts * options.group * (options.steps - options.warmup)
    tolerance = STANDARD_ERRORS * (2 / completions) ** 0.5
    far = {name: x.median for name, x in lengths.items() if abs(x.median - ours) > tolerance * ours}
    if far:
        sys.exit(
            f"completions differ in length, so the sides did not do the same work: kitae {ours:.0f}, {far}"
        )


if __name__ == "__main__":
    main()
