"""FP8 to BF16 against what reading, casting and writing the same bytes costs with torch alone.

    one FP8 model --kitae | floor, alternately--> a BF16 copy, on the disk --> bytes written per second

The floor does no more than it must: safetensors' load_file, .to(bfloat16) of the FP8 weights without their scales,
save_file and fsync, a file after the other. Both find the source in the page cache after their first round.
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
    from safetensors.torch import load_file, save_file

    from kitae.export.convert import How, fp8_to_bf16

CONTENDERS = ("kitae", "floor")
AIM = 0.6


def make_model(folder: Path, *, files: int, experts: int) -> None:
    """Experts of DeepSeek-V3's size, with scales."""
    block = {"weight_block_size": [128, 128], "quant_method": "fp8"}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "deepseek_v3", "quantization_config": block})
    )
    mapping = {}
    for number in range(files):
        tensors = {}
        for e in range(experts):
            for part, size in (("gate", (2048, 7168)), ("up", (2048, 7168)), ("down", (7168, 2048))):
                name = f"model.layers.{number}.mlp.experts.{e}.{part}_proj.weight"
                tensors[name] = torch.randn(size).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = torch.rand(size[0] // 128, size[1] // 128) + 0.5
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        mapping |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))


def run_kitae(source: Path, target: Path, *, threads: int) -> None:
    fp8_to_bf16(str(source), How(output=target, num_workers=threads))


def run_floor(source: Path, target: Path, *, threads: int) -> None:
    torch.set_num_threads(threads)
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        tensors = {name: t for name, t in load_file(file).items() if not name.endswith("_scale_inv")}
        save_file({name: t.to(torch.bfloat16) for name, t in tensors.items()}, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def worker(args: argparse.Namespace) -> None:
    """Make the model, or convert it once; prints one line of JSON."""
    if args.worker == "model":
        make_model(args.source, files=args.files, experts=args.experts)
        print("{}")
        return
    target = args.source.with_name("out")
    started = time.perf_counter()
    (run_kitae if args.worker == "kitae" else run_floor)(args.source, target, threads=args.threads)
    seconds = time.perf_counter() - started
    written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    shutil.rmtree(target)
    print(json.dumps({"seconds": seconds, "mib_per_s": written / 2**20 / seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8, help="experts of 42 MiB in each file")
    parser.add_argument("--worker", choices=["model", *CONTENDERS], help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as folder:
        source = Path(folder) / "fp8"
        source.mkdir()

        def contender(name: str) -> Contender:
            options = [f"--{option}={getattr(args, option)}" for option in ("files", "experts", "threads")]
            command = [sys.executable, __file__, "--worker", name, "--source", str(source), *options]
            return Contender(name, command, harness.thread_env(args.threads))

        harness.measure(contender("model"))
        measured = harness.run_rounds([contender(name) for name in CONTENDERS], rounds=args.rounds)
    report(measured, args)


def report(measured: dict[str, list[Measurement]], args: argparse.Namespace) -> None:
    print(f"FP8 to BF16, {args.files} files of {args.experts} experts, {args.threads} threads")
    harness.print_machine(measured)
    comparisons = harness.compare(measured, key="mib_per_s", targets={"floor": (AIM, None)})
    harness.print_comparisons(comparisons, unit="MiB/s written")
    if args.json:
        harness.write_json(args.json, measured=measured, comparisons=comparisons, unit="MiB/s written")


if __name__ == "__main__":
    main()
