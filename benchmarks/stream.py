"""A single completion against llama.cpp: `python benchmarks/stream.py`.

One completion at a time of a Qwen3-like model of 30 M parameters with random weights. Printed are the medians of
milliseconds per decoded token, the prompt's left out, and how near kitae is to the floor: each token reads all weights
once, and a buffer as large as they are is read as fast as torch can, in the same process. `--contenders kitae int8` compares
with 8-bit weights. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness
import llama_cpp
import rollout
from harness import Contender, Measurement

PEERS = ("kitae", "llama.cpp")
CONTENDERS = (*PEERS, "int8")
TARGET = 1.7
"""Times as fast as llama.cpp."""
SHARE_OF_FLOOR = 0.6
"""Share of the rate at which this machine reads a buffer as large as the weights."""
PROMPTS, LENGTH = 5, 129
READS = 15


def run_kitae(folder: Path, prompts: list[list[int]], *, dtype: str, is_int8: bool) -> dict[str, float]:
    from torch import nn

    from kitae.config import ModelSettings, SamplingSettings
    from kitae.models.load import load_policy
    from kitae.rollout.choose import open_engine
    from kitae.types import Problem

    policy = load_policy(ModelSettings(name_or_path=str(folder), dtype=dtype, device="cpu"), trainable=False)
    engine, _ = open_engine(
        policy,
        wanted="native",
        quantization="int8" if is_int8 else "none",
        setting="engine",
        expected_tokens=PROMPTS * LENGTH,
        stop_ids=[],
        decode=lambda ids: "",
        max_rows=1,
    )

    def seconds(prompt: list[int], length: int) -> float:
        problem = Problem(prompt="", token_ids=prompt, index=0)
        started = time.perf_counter()
        engine.generate_up_to([[length]], problems=[problem], sampling=SamplingSettings(), seed=0)
        return time.perf_counter() - started

    seconds(prompts[0], LENGTH)
    taken = [(seconds(prompt, LENGTH) - seconds(prompt, 1)) / (LENGTH - 1) for prompt in prompts]
    linears = [module for module in policy.causal_lm.modules() if isinstance(module, nn.Linear)]
    num_bytes = sum(module.weight.numel() for module in linears) * (
        1 if is_int8 else 2 if dtype == "bfloat16" else 4
    )
    return {
        "ms_per_token": 1e3 * statistics.median(taken),
        "weights_mib": num_bytes / 2**20,
        "read_floor_ms": 1e3 * num_bytes / read_rate(num_bytes),
    }


def read_rate(num_bytes: int) -> float:
    """Bytes per second at which torch's fastest reduction reads a buffer of that size, again and again."""
    import torch

    buffer = torch.ones(num_bytes // 4)
    medians = []
    for reduce in (lambda: torch.dot(buffer, buffer), buffer.sum, buffer.max, buffer.view(torch.int64).sum):
        taken = []
        for _ in range(READS):
            started = time.perf_counter()
            reduce()
            taken.append(time.perf_counter() - started)
        medians.append(statistics.median(taken))
    return num_bytes / min(medians)


def run_llama(args: argparse.Namespace, prompts: list[list[int]]) -> dict[str, float]:
    model = rollout.gguf_of(args.model, dtype=args.dtype)
    context = max(map(len, prompts)) + LENGTH + 1
    with llama_cpp.Server(llama_cpp.build(), model, slots=1, context=context, threads=args.threads) as server:
        server.complete(prompts[0], length=LENGTH, seed=0)
        answers = [server.complete(prompt, length=LENGTH, seed=0) for prompt in prompts]
        return {
            "ms_per_token": statistics.median(
                answer["timings"]["predicted_per_token_ms"] for answer in answers
            ),
            "peak_rss_mib": server.peak_rss_mib(),
        }


def worker(args: argparse.Namespace) -> None:
    """Run one contender; prints one line of JSON."""
    import torch

    torch.set_num_threads(args.threads)
    vocab_size = rollout.SIZES[args.size]["vocab_size"]
    prompts, _ = rollout.workload(vocab_size=vocab_size, num_prompts=PROMPTS, group=1, longest=LENGTH)
    run = (
        run_llama(args, prompts)
        if args.worker == "llama.cpp"
        else run_kitae(args.model, prompts, dtype=args.dtype, is_int8=args.worker == "int8")
    )
    print(json.dumps(run))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--size", choices=["30m", "tiny"], default="30m")
    parser.add_argument("--dtypes", nargs="+", choices=rollout.DTYPES, default=list(rollout.DTYPES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(PEERS))
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=rollout.DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    if "kitae" not in args.contenders:
        parser.error("--contenders must have kitae, which the others are compared with")
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as folder:
        make = [sys.executable, rollout.__file__, "--worker", "model", "--model", folder, "--size", args.size]
        if "llama.cpp" in args.contenders:
            make += ["--gguf", *args.dtypes]
        harness.measure(Contender("model", make))
        for dtype in args.dtypes:
            command = [sys.executable, __file__, "--model", folder, "--dtype", dtype, "--size", args.size]
            command += ["--threads", str(args.threads), "--worker"]
            env = harness.thread_env(args.threads) | {"HF_HUB_OFFLINE": "1"}
            contenders = [Contender(name, [*command, name], env) for name in args.contenders]
            report(harness.run_rounds(contenders, rounds=args.rounds), args, dtype=dtype)


def report(measured: dict[str, list[Measurement]], args: argparse.Namespace, *, dtype: str) -> None:
    print(f"one completion, {args.size} model in {dtype}, {args.threads} threads, {args.rounds} rounds")
    harness.print_machine(measured)
    comparisons = harness.compare(
        measured, key="ms_per_token", is_time=True, targets={"llama.cpp": (TARGET, None)}
    )
    harness.print_comparisons(comparisons, unit="ms/token", digits=3)
    limit = harness.spread(measured["kitae"], "read_floor_ms").median
    floor = {
        "what": f"reading {measured['kitae'][0].values['weights_mib']:.0f} MiB of weights once",
        "limit": limit,
        "share": limit / harness.spread(measured["kitae"], "ms_per_token").median,
        "target": SHARE_OF_FLOOR,
    }
    print(
        f"floor: {floor['what']} takes {limit:.3f} ms; kitae is at {floor['share']:.0%}, target {SHARE_OF_FLOOR:.0%}"
    )
    if args.json:
        path = args.json if len(args.dtypes) == 1 else args.json.with_stem(f"{args.json.stem}-{dtype}")
        harness.write_json(path, measured=measured, comparisons=comparisons, unit="ms/token", floor=floor)


if __name__ == "__main__":
    main()
