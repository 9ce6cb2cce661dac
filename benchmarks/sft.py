"""SFT against TRL and transformers' Trainer: `python benchmarks/sft.py --peer-python /path/to/python/with/trl`.

All train the same model on the same chat rows, alternately, each measurement in a process of its own; printed are
medians, spreads and the ratios. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import harness
from chat_workload import SIZES
from harness import Contender, Measurement

HERE = Path(__file__).resolve().parent
PEERS = {
    "trl": ["sft_trl.py", "--variant", "default"],
    "trl-packed": ["sft_trl.py", "--variant", "packed"],
    "trl-packed-best": ["sft_trl.py", "--variant", "packed", "--gradient-checkpointing", "off"],
    "trl-padding-free": ["sft_trl.py", "--variant", "padding_free", "--gradient-checkpointing", "off"],
    "trl-liger": ["sft_trl.py", "--variant", "default", "--liger"],
    "trl-liger-best": ["sft_trl.py", "--variant", "packed", "--gradient-checkpointing", "off", "--liger"],
    "transformers": ["sft_transformers.py"],
    "kitae-recompute": ["sft_kitae.py", "--gradient-checkpointing", "on"],
}
"""TRL as it comes; with one packed row of --max-length tokens a step; that without recomputing activations; padding-free;
with Liger's kernels, as it comes and as packed without recomputing; transformers' Trainer; and kitae
itself with layers recomputed."""
TARGETS: dict[tuple[str, bool], dict[str, tuple[float | None, float | None]]] = {
    ("5m", False): {"trl": (5.5, 0.35), "trl-packed-best": (3.0, 0.6)},
    ("5m", True): {"trl": (6.0, 0.35), "trl-packed-best": (3.5, 0.55)},
    ("42m-150k", False): {"trl": (12.0, 0.33), "trl-packed-best": (6.0, 0.7)},
    ("1.5b", True): {"trl-liger": (1.5, 0.7), "trl-liger-best": (1.5, 0.7)},
    ("13m-moe", False): {"trl": (4.5, 0.6), "trl-packed-best": (2.5, 0.9)},
}
"""What kitae is to reach at a size, fully trained or as LoRA: times a peer's tokens per second, share of its memory."""
SHARE_OF_FLOOR = 0.6
"""How much of that speed (sft_floor.py) kitae is to reach."""
LOSS_TOLERANCE = 0.02
"""Relative difference of mean losses beyond which the sides did not do the same work."""


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as temporary:
        folder = options.keep or Path(temporary)
        workload = make_workload(folder, options, device=options.device)
        if options.precision == "same":
            options.precision = "bfloat16" if workload["fast_bfloat16"] else "float32"
        contenders = [kitae(folder, options), *(peer(name, folder, options) for name in options.peers)]
        measured = harness.run_rounds(contenders, rounds=options.rounds)
        is_dense = "n_routed_experts" not in SIZES[options.size]
        has_floor = options.device == "cpu" and not options.lora_rank and is_dense
        floor = measure_floor(folder, options, workload, measured["kitae"]) if has_floor else None
    report(measured, workload=workload, floor=floor, options=options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=["trl", "trl-packed-best", "transformers"]
    )
    parser.add_argument(
        "--precision",
        choices=["same", "default", "float32", "bfloat16"],
        default="same",
        help="same: bfloat16 where this CPU has instructions for it, else float32; default: each side's own choice",
    )
    parser.add_argument("--size", choices=SIZES, default="5m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5, help="steps before the clock starts")
    parser.add_argument(
        "--lora-rank", type=int, default=0, help="LoRA of all linear layers instead of full training"
    )
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a packed row of TRL's")
    parser.add_argument("--length", type=int, help="tokens of every row (default: ragged)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--quantization", choices=["none", "nf4"], default="none", help="of the frozen weights"
    )
    parser.add_argument(
        "--keep", type=Path, help="folder for model, rows and runs, kept (default: a temporary one)"
    )
    options = parser.parse_args()
    if not 0 < options.warmup < options.steps:
        parser.error(f"--warmup {options.warmup} must be at least 1 and below --steps {options.steps}")
    return options


def make_workload(folder: Path, options: argparse.Namespace, *, device: str = "cpu") -> dict[str, float]:
    rows = options.steps * options.batch_size
    script = str(HERE / "chat_workload.py")
    command = [sys.executable, script, str(folder), "--size", options.size, "--rows", str(rows)]
    command += ["--device", device]
    length = getattr(options, "length", None)
    command += ["--length", str(length)] if length else []
    return harness.measure(Contender("workload", command)).values


def kitae(folder: Path, options: argparse.Namespace) -> Contender:
    command = [
        sys.executable,
        str(HERE / "sft_kitae.py"),
        *shared_flags(folder, options),
        *own_flags(options),
    ]
    return Contender("kitae", command, harness.thread_env(options.threads))


def peer(name: str, folder: Path, options: argparse.Namespace) -> Contender:
    script, *flags = PEERS[name]
    python = sys.executable if script == "sft_kitae.py" else options.peer_python
    command = [python, str(HERE / script), *flags]
    command += [*shared_flags(folder, options), *own_flags(options)]
    return Contender(name, command, harness.thread_env(options.threads))


def shared_flags(folder: Path, options: argparse.Namespace) -> list[str]:
    named = {
        "folder": folder,
        "precision": options.precision,
        "batch-size": options.batch_size,
        "steps": options.steps,
        "warmup": options.warmup,
        "lora-rank": options.lora_rank,
    }
    return as_flags(named)


def device_flags(*, max_length: int, device: str = "cpu", quantization: str = "none") -> list[str]:
    """The flags that the scripts of SFT have beside the shared ones."""
    return as_flags({"max-length": max_length, "device": device, "quantization": quantization})


def as_flags(named: dict[str, object]) -> list[str]:
    return [text for name, value in named.items() for text in (f"--{name}", str(value))]


def own_flags(options: argparse.Namespace) -> list[str]:
    return device_flags(
        max_length=options.max_length, device=options.device, quantization=options.quantization
    )


def measure_floor(
    folder: Path, options: argparse.Namespace, workload: dict[str, float], ours: list[Measurement]
) -> Measurement:
    named = {
        "folder": folder,
        "precision": options.precision,
        "tokens": ours[0].values["tokens_per_step"],
        "taught-share": workload["taught_share"],
        "seen": workload["mean_seen"],
    }
    command = [sys.executable, str(HERE / "sft_floor.py"), *as_flags(named)]
    return harness.measure(Contender("floor", command, harness.thread_env(options.threads)))


def report(
    measured: dict[str, list[Measurement]],
    *,
    workload: dict[str, float],
    floor: Measurement | None,
    options: argparse.Namespace,
) -> None:
    training = f"LoRA r {options.lora_rank}, all linear layers" if options.lora_rank else "full"
    print(
        f"SFT, {training}: {workload['parameters'] / 1e6:.1f} M parameters, {workload['rows']} rows of "
        f"{workload['median_tokens']:.0f} tokens (median; mean {workload['mean_tokens']:.0f}, "
        f"longest {workload['longest']}), {workload['taught_share']:.0%} taught; {options.batch_size} rows a step, "
        f"{options.steps - options.warmup} steps after {options.warmup}; precision {options.precision}, "
        f"{options.threads} threads, {options.rounds} rounds"
    )
    harness.print_machine(measured)
    for name, runs in measured.items():
        print(f"{name}: {runs[0].values['precision']}; {runs[0].values['versions']}")
    targets = TARGETS.get((options.size, options.lora_rank > 0), {})
    memory = harness.memory_key(options.device)
    comparisons = harness.compare(measured, key="tokens_per_s", memory=memory, targets=targets)
    harness.print_comparisons(comparisons, unit="tokens/s")
    found = None
    if floor is not None:
        limit = floor.values["tokens_per_s"]
        found = {
            "what": "the model's arithmetic at the rate of the step's matrix products alone",
            "limit": limit,
            "share": harness.spread(measured["kitae"], "tokens_per_s").median / limit,
            "target": SHARE_OF_FLOOR,
        }
        print(
            f"floor: {found['what']} would allow {limit:,.0f} tokens/s ({floor.values['gflop_per_s']:,.0f} GFLOP/s); "
            f"kitae is at {found['share']:.0%}, target {SHARE_OF_FLOOR:.0%}"
        )
    if options.json:
        harness.write_json(
            options.json,
            measured=measured,
            comparisons=comparisons,
            unit="tokens/s",
            floor=found,
            workload=workload,
        )
    check_losses(measured)


def check_losses(measured: dict[str, list[Measurement]]) -> None:
    """The same rows from the same weights give about the same mean loss, whatever the order."""
    losses = {name: [float(m.values["loss"]) for m in runs] for name, runs in measured.items()}
    ours = losses["kitae"][0]
    far = {name: theirs for name, theirs in losses.items() if not is_near(theirs, ours)}
    if far:
        sys.exit(f"mean losses differ, so the sides did not do the same work: kitae {ours:.4f}, {far}")


def is_near(losses: Sequence[float], ours: float) -> bool:
    return all(abs(loss - ours) <= LOSS_TOLERANCE * abs(ours) for loss in losses)


if __name__ == "__main__":
    main()
