"""kitae's engines against transformers' generate on one sampling round: `python benchmarks/rollout.py`.

The round: 16 prompts of 64 to 128 tokens, 8 completions each, lengths drawn once from a log-normal distribution
(median about 100, at most 256) and forced on all, a Qwen3-like model of 30 M parameters with random weights, or with
`--size 80m-moe` a DeepSeek-V3-like one: latent attention, 16 experts of which 4 compute. They run in
turn, each measurement in a process of its own; printed are the medians of useful tokens per second, the native engine's
ratio to each, and peak memory. `--prompts 1 --group 1` is a single stream. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

import harness
from harness import Contender, Measurement

DTYPES = ("float32", "bfloat16")
ENGINES = ("native", "generic", "generate")
TARGET = 10.5
"""What the native engine's tokens per second are to be as a multiple of generate's."""
GENERATE_BATCH = {"float32": 32, "bfloat16": 128}
"""Rows per call of generate: its best on the machine this was first measured on."""
SIZES = {
    "30m": {"family": "qwen3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16384, "max_position_embeddings": 2048},
    "80m-moe": {"family": "deepseek_v3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10,
                "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 16384, "moe_intermediate_size": 256,
                "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
                "first_k_dense_replace": 1, "q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
                "qk_rope_head_dim": 32, "v_head_dim": 64, "max_position_embeddings": 2048},
    "tiny": {"family": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 2048},
}  # fmt: skip


def workload(
    *, vocab_size: int, num_prompts: int, group: int, longest: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts as token ids, and how many tokens each of their completions gets."""
    numbers = random.Random(1)
    prompts = [
        [numbers.randrange(10, vocab_size) for _ in range(numbers.randint(64, 128))]
        for _ in range(num_prompts)
    ]
    lengths = [
        [int(min(max(numbers.lognormvariate(math.log(100), 0.6), 8), longest)) for _ in range(group)]
        for _ in prompts
    ]
    return prompts, lengths


def run_kitae(
    folder: Path, prompts: list[list[int]], lengths: list[list[int]], *, dtype: str, engine: str
) -> float:
    from kitae.config import ModelSettings, SamplingSettings
    from kitae.models.load import load_policy
    from kitae.rollout.choose import open_engine
    from kitae.types import Problem

    policy = load_policy(ModelSettings(name_or_path=str(folder), dtype=dtype, device="cpu"), trainable=False)
    engine, _ = open_engine(
        policy,
        wanted=engine,
        setting="engine",
        expected_tokens=sum(map(sum, lengths)),
        stop_ids=[],
        decode=lambda ids: "",
        max_rows=128,
    )
    problems = [Problem(prompt="", token_ids=ids, index=i) for i, ids in enumerate(prompts)]
    engine.generate_up_to([[2]], problems=problems[:1], sampling=SamplingSettings(), seed=0)
    start = time.perf_counter()
    groups = engine.generate_up_to(lengths, problems=problems, sampling=SamplingSettings(), seed=0)
    seconds = time.perf_counter() - start
    assert [[len(r.token_ids) for r in group] for group in groups] == lengths
    return seconds


def run_generate(
    folder: Path, prompts: list[list[int]], lengths: list[list[int]], *, dtype: str, batch: int
) -> float:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    rows = [(prompt, length) for prompt, group in zip(prompts, lengths, strict=True) for length in group]
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(map(max, lengths))
    )
    config.pad_token_id = 0

    class Lengths(StoppingCriteria):
        def __init__(self, start: int, lengths: list[int]) -> None:
            self.ends = start + torch.tensor(lengths)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends

    def generate(rows: list[tuple[list[int], int]]) -> None:
        width = max(len(prompt) for prompt, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (prompt, _) in enumerate(rows):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        stop = StoppingCriteriaList([Lengths(width, [length for _, length in rows])])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=stop)
        assert out.shape[1] == width + max(length for _, length in rows)

    generate([(prompts[0], 2)])
    start = time.perf_counter()
    for first in range(0, len(rows), batch):
        generate(rows[first : first + batch])
    return time.perf_counter() - start


def make_model(folder: Path, size: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from kitae.models.toy import make_config

    torch.manual_seed(0)
    sizes = dict(SIZES[size])
    config = make_config(sizes.pop("family"), eos_token_id=None, pad_token_id=None, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def worker(args: argparse.Namespace) -> None:
    """Make the model, or run one engine on one round; prints one line of JSON."""
    import torch

    if args.worker == "model":
        make_model(args.model, args.size)
        print(json.dumps({"model": str(args.model)}))
        return
    torch.set_num_threads(args.threads)
    prompts, lengths = round_of(args)
    if args.worker != "generate":
        seconds = run_kitae(args.model, prompts, lengths, dtype=args.dtype, engine=args.worker)
    else:
        seconds = run_generate(
            args.model, prompts, lengths, dtype=args.dtype, batch=GENERATE_BATCH[args.dtype]
        )
    print(json.dumps({"seconds": seconds, "tokens_per_s": sum(map(sum, lengths)) / seconds}))


def round_of(args: argparse.Namespace) -> tuple[list[list[int]], list[list[int]]]:
    return workload(
        vocab_size=SIZES[args.size]["vocab_size"],
        num_prompts=args.prompts,
        group=args.group,
        longest=args.longest,
    )


def contender(engine: str, args: argparse.Namespace, *, dtype: str, model: Path) -> Contender:
    options = ["size", "prompts", "group", "longest", "threads"]
    command = [sys.executable, __file__, "--worker", engine, "--model", str(model), "--dtype", dtype]
    command += [f"--{name}={getattr(args, name)}" for name in options]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return Contender(f"{engine} {dtype}", command, harness.thread_env(args.threads) | quiet)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--size", choices=SIZES, default="30m")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--longest", type=int, default=256, help="most tokens of a completion")
    parser.add_argument("--dtype", choices=DTYPES, help="default: both")
    parser.add_argument("--worker", choices=["model", *ENGINES], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return

    measured: dict[str, list[Measurement]] = {}
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as folder:
        harness.measure(contender("model", args, dtype="float32", model=Path(folder)))
        for dtype in [args.dtype] if args.dtype else DTYPES:
            engines = [contender(engine, args, dtype=dtype, model=Path(folder)) for engine in ENGINES]
            measured |= harness.run_rounds(engines, rounds=args.rounds)
    report(measured, args)


def report(measured: dict[str, list[Measurement]], args: argparse.Namespace) -> None:
    useful = sum(map(sum, round_of(args)[1]))
    print(
        f"sampling, {args.size} model, {useful} useful tokens, {args.threads} threads, {args.rounds} rounds"
    )
    harness.print_machine(measured)
    rows = []
    for name, runs in measured.items():
        numbers = [harness.show(harness.spread(runs, key)) for key in ("tokens_per_s", "peak_rss_mib")]
        engine, dtype = name.split()
        ratio = harness.ratio(measured[f"native {dtype}"], runs, "tokens_per_s")
        shown = "" if engine == "native" else harness.show(ratio, digits=2)
        rows.append([name, *numbers, shown, f">= {TARGET}" if engine == "generate" else ""])
    harness.print_table(["", "tokens/s", "peak RSS MiB", "native's speed", "target"], rows)
    if args.json:
        harness.write_json(args.json, measured=measured, size=args.size, useful_tokens=useful)


if __name__ == "__main__":
    main()
