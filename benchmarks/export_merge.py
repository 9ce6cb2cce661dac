"""Merging a LoRA adapter against copying the same model.

    one BF16 model and an adapter --kitae | copy, alternately--> a folder, on the disk --> bytes written per second

The copy does no more than it must: shutil.copyfile of every shard and fsync, a file after the other. Both find the
source in the page cache after their first round. The gate is a benchmark of its own subject and is not run here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import harness
from harness import Contender, Measurement

if "--worker" in sys.argv:  # what a child measures; the parent stays small, and imports count for nobody
    import torch
    from safetensors.torch import save_file

    from kitae.export.convert import How, merge

CONTENDERS = ("kitae", "copy")
AIM = 0.6
UNIT = "MiB/s written"
HIDDEN, INNER, KEYS, RANK = 4096, 12288, 1024, 16
"""Qwen3-8B's sizes, and a usual rank."""
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


def make_model(folder: Path, *, layers: int) -> None:
    """Layers of Qwen3-8B's size, one a file, and an adapter on every linear of them."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    mapping, pairs = {}, {}
    for number in range(layers):
        tensors = {}
        for module, (out, into) in SIZES.items():
            name = f"model.layers.{number}.{module}"
            tensors[f"{name}.weight"] = torch.randn(out, into).mul_(0.02).bfloat16()
            pairs[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, into).mul_(0.02)
            pairs[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK).mul_(0.02)
        file = f"model-{number + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, base / file, metadata={"format": "pt"})
        mapping |= dict.fromkeys(tensors, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    (base / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    save_file(pairs, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 32, "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def run_kitae(source: Path, target: Path, *, threads: int) -> None:
    merge(str(source / "adapter"), How(output=target, num_workers=threads))


def run_copy(source: Path, target: Path, *, threads: int) -> None:
    target.mkdir()
    for file in sorted((source / "base").glob("*.safetensors")):
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def worker(args: argparse.Namespace) -> None:
    """Make the model, or write it once; prints one line of JSON."""
    if args.worker == "model":
        make_model(args.source, layers=args.layers)
        print("{}")
        return
    target = args.source / "out"
    started = time.perf_counter()
    (run_kitae if args.worker == "kitae" else run_copy)(args.source, target, threads=args.threads)
    seconds = time.perf_counter() - started
    written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    shutil.rmtree(target)
    print(json.dumps({"seconds": seconds, "mib_per_s": written / 2**20 / seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--layers", type=int, default=4, help="layers of 368 MiB")
    parser.add_argument("--worker", choices=["model", *CONTENDERS], help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as folder:

        def contender(name: str) -> Contender:
            options = [f"--{option}={getattr(args, option)}" for option in ("layers", "threads")]
            command = [sys.executable, __file__, "--worker", name, "--source", folder, *options]
            return Contender(name, command, harness.thread_env(args.threads))

        harness.measure(contender("model"))
        measured = harness.run_rounds([contender(name) for name in CONTENDERS], rounds=args.rounds)
    report(measured, args)


def report(measured: dict[str, list[Measurement]], args: argparse.Namespace) -> None:
    print(f"merging rank {RANK}, {args.layers} layers of Qwen3-8B's size, {args.threads} threads")
    harness.print_machine(measured)
    comparisons = harness.compare(measured, key="mib_per_s", targets={"copy": (AIM, None)})
    harness.print_comparisons(comparisons, unit=UNIT)
    if args.json:
        harness.write_json(args.json, measured=measured, comparisons=comparisons, unit=UNIT)


if __name__ == "__main__":
    main()
