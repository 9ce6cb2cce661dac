"""kitae's engines against other samplers on one sampling round: `python benchmarks/rollout.py`.

The round: 16 prompts of 64 to 128 tokens, 8 completions each, lengths drawn once from a log-normal distribution
(median about 100, at most 256) and forced on all, a Qwen3-like model of 30 M parameters with random weights, or with
`--size 80m-moe` a DeepSeek-V3-like one: latent attention, 16 experts of which 4 compute. They run in
turn, each measurement in a process of its own; printed are the medians of useful tokens per second, the native engine's
ratio to each, peak memory, and how near the native engine is to its floor (products_alone). Peers: `generate` and
continuous batching of transformers, and llama.cpp's server, built for this machine (llama_cpp.py). `--engines native int8`
compares the native engine with itself sampling by 8-bit weights, and says how far either's log-probs are from the
learner's. See docs/benchmarks.md; stream.py measures a single completion.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import harness
import llama_cpp
from chat_workload import CONTROL, TEMPLATE
from harness import Contender, Measurement

DTYPES = ("float32", "bfloat16")
PEERS = ("native", "generic", "generate", "continuous", "llama.cpp")
ENGINES = (*PEERS, "int8")
TARGETS: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "float32": {"generate": (10.5, None), "continuous": (12.0, None), "llama.cpp": (3.0, None)},
    "bfloat16": {"generate": (10.5, None), "continuous": (12.0, None), "llama.cpp": (4.0, None)},
}
"""What the native engine's tokens per second are to be as a multiple of a peer's."""
ROWS = 128
"""Completions that kitae's engines sample at a time."""
REPEATS = 15
"""Of each product that the floor is made of."""
LLAMA_SLOTS = 64
"""Completions that llama.cpp's server samples at a time: its best on the machine this was first measured on."""
GENERATE_BATCH = {"float32": 32, "bfloat16": 128}
"""Rows per call of generate: its best on the machine this was first measured on."""
SIZES: dict[str, dict[str, Any]] = {
    "30m": {"family": "qwen3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16384,
            "max_position_embeddings": 2048},
    "80m-moe": {"family": "deepseek_v3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10,
                "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 16384, "moe_intermediate_size": 256,
                "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
                "first_k_dense_replace": 1, "q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
                "qk_rope_head_dim": 32, "v_head_dim": 64, "max_position_embeddings": 2048},
    "tiny": {"family": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
             "max_position_embeddings": 2048},
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
) -> dict[str, float]:
    """Seconds, how far the sampler's log-probs of some tokens are from the learner's on average, and the floor's seconds."""
    from kitae.config import ModelSettings, SamplingSettings
    from kitae.models.load import load_policy
    from kitae.rollout.choose import open_engine
    from kitae.types import Problem

    policy = load_policy(ModelSettings(name_or_path=str(folder), dtype=dtype, device="cpu"), trainable=False)
    sampler, _ = open_engine(
        policy,
        wanted="auto" if engine == "int8" else engine,
        quantization="int8" if engine == "int8" else "none",
        setting="engine",
        expected_tokens=sum(map(sum, lengths)),
        stop_ids=[],
        decode=lambda ids: "",
        max_rows=ROWS,
    )
    problems = [Problem(prompt="", token_ids=ids, index=i) for i, ids in enumerate(prompts)]
    sampler.generate_up_to([[2]], problems=problems[:1], sampling=SamplingSettings(), seed=0)
    start = time.perf_counter()
    groups = sampler.generate_up_to(lengths, problems=problems, sampling=SamplingSettings(), seed=0)
    seconds = time.perf_counter() - start
    assert [[len(r.token_ids) for r in group] for group in groups] == lengths
    found = {"seconds": seconds, "logprob_gap": gap([group[0] for group in groups], policy)}
    if engine == "native" and not hasattr(policy.config, "n_routed_experts"):
        found["floor_s"] = products_alone(policy, prompts, lengths)
    return found


def products_alone(policy: Any, prompts: list[list[int]], lengths: list[list[int]]) -> float:
    """Seconds that torch would need for the linear layers' products of the round and nothing else.

    A prompt is read once for its group and its last token alone meets the head. Each product is timed at as many rows as are
    sampled together, in the fastest of three layouts of the weights, and the round taken at that rate: fewer rows, as at a
    round's end, are slower in truth.
    """
    import torch
    from torch import nn

    decoded = sum(map(sum, lengths)) - sum(map(len, lengths))  # a first token comes from its prompt's last
    head = policy.causal_lm.get_output_embeddings()
    total = 0.0
    with torch.no_grad():
        for module in policy.causal_lm.modules():
            if not isinstance(module, nn.Linear):
                continue
            w_NK = module.weight
            w_KN = w_NK.t().contiguous()
            x_MK = torch.randn(ROWS, w_NK.shape[1]).to(w_NK.dtype)
            x_KM = x_MK.t().contiguous()
            layouts = ((x_MK, w_NK.t()), (x_MK, w_KN), (w_NK, x_KM))
            seconds = min(
                harness.median_seconds(partial(torch.matmul, *pair), repeats=REPEATS) for pair in layouts
            )
            tokens = decoded + (len(prompts) if module is head else sum(map(len, prompts)))
            total += seconds / ROWS * tokens
    return total


def gap(rollouts: list[Any], policy: Any) -> float:
    """Mean distance of the log-probs that rollouts came with from those the policy gives them."""
    import torch

    from kitae.data.collate import collate
    from kitae.types import Row

    rows = [
        Row(
            token_ids=r.problem.token_ids + r.token_ids,
            loss_mask=[False] * len(r.problem.token_ids) + [True] * len(r.token_ids),
            streams={"old_logprobs": [0.0] * len(r.problem.token_ids) + r.logprobs},
        )
        for r in rollouts
    ]
    with torch.no_grad():
        gaps = [policy(b).logprobs_N - b.streams["old_logprobs"] for b in collate(rows, rows_per_forward=4)]
    return torch.cat(gaps).abs().mean().item()


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


def run_continuous(folder: Path, prompts: list[list[int]], lengths: list[list[int]], *, dtype: str) -> float:
    """transformers' continuous batching, which sizes its cache by what it is told of the requests."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    requests = [(prompt, length) for prompt, group in zip(prompts, lengths, strict=True) for length in group]
    longest = max(length for _, length in requests)
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=longest)
    config.pad_token_id, config.eos_token_id = 0, -1
    hints = WorkloadHints(
        max_prompt_length=max(map(len, prompts)),
        max_generated_length=longest,
        num_requests=len(requests),
    )
    with model.continuous_batching_context_manager(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(seed=0),
        workload_hints=hints,
    ) as manager:
        start = time.perf_counter()
        for number, (prompt, length) in enumerate(requests):
            manager.add_request(prompt, request_id=str(number), max_new_tokens=length, eos_token_id=-1)
        sampled: dict[str, int] = {}
        while len(sampled) < len(requests):
            answer = manager.get_result(timeout=1)
            if answer is not None and answer.is_finished():
                sampled[answer.request_id] = len(answer.generated_tokens)
            assert answer is not None or manager.is_running(), "continuous batching stopped early"
        seconds = time.perf_counter() - start
    assert [sampled[str(i)] for i in range(len(requests))] == [length for _, length in requests]
    return seconds


def run_llama(
    args: argparse.Namespace, prompts: list[list[int]], lengths: list[list[int]]
) -> tuple[float, float]:
    """Seconds of the round and peak memory of the server in MiB."""
    context = max(map(len, prompts)) + max(map(max, lengths)) + 1
    slots = min(LLAMA_SLOTS, sum(map(len, lengths)))
    model = gguf_of(args.model, dtype=args.dtype)
    with llama_cpp.Server(
        llama_cpp.build(), model, slots=slots, context=context, threads=args.threads
    ) as server:
        server.complete(prompts[0], length=2, seed=0)
        seconds = server.complete_all(prompts, lengths)
        return seconds, server.peak_rss_mib()


def gguf_of(model: Path, *, dtype: str) -> Path:
    """Where make_model left the model for llama.cpp."""
    return model / f"{dtype}.gguf"


def make_model(folder: Path, size: str) -> None:
    """A model with random weights, and a tokenizer that has its vocabulary's size, as llama.cpp wants one."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from kitae.models.toy import make_config

    torch.manual_seed(0)
    config = make_config(eos_token_id=None, pad_token_id=None, **SIZES[size])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    names = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"word{number}" for number in range(config.vocab_size - len(names))]
    core = Tokenizer(BPE({name: i for i, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in CONTROL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)


def worker(args: argparse.Namespace) -> None:
    """Make the model, or run one engine on one round; prints one line of JSON."""
    import torch

    if args.worker == "model":
        make_model(args.model, args.size)
        if args.gguf:
            llama_cpp.build()
            for dtype in args.gguf:
                llama_cpp.export(args.model, gguf_of(args.model, dtype=dtype), dtype=dtype)
        print(json.dumps({"model": str(args.model)}))
        return
    torch.set_num_threads(args.threads)
    prompts, lengths = round_of(args)
    also = {}
    if args.worker == "llama.cpp":
        seconds, also["peak_rss_mib"] = run_llama(args, prompts, lengths)
    elif args.worker == "continuous":
        seconds = run_continuous(args.model, prompts, lengths, dtype=args.dtype)
    elif args.worker != "generate":
        also = run_kitae(args.model, prompts, lengths, dtype=args.dtype, engine=args.worker)
        seconds = also.pop("seconds")
    else:
        seconds = run_generate(
            args.model, prompts, lengths, dtype=args.dtype, batch=GENERATE_BATCH[args.dtype]
        )
    print(json.dumps({"seconds": seconds, "tokens_per_s": sum(map(sum, lengths)) / seconds, **also}))


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
    if engine == "model" and "llama.cpp" in args.engines:
        command += ["--gguf", *args.dtypes]
    return Contender(engine, command, harness.thread_env(args.threads) | quiet)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--size", choices=SIZES, default="30m")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--longest", type=int, default=256, help="most tokens of a completion")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(PEERS))
    parser.add_argument("--worker", choices=["model", *ENGINES], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    parser.add_argument("--gguf", nargs="*", choices=DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return

    if "native" not in args.engines or len(args.engines) < 2:
        parser.error("--engines must have native and what it is compared with")
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as folder:
        harness.measure(contender("model", args, dtype="float32", model=Path(folder)))
        for dtype in args.dtypes:
            engines = [contender(engine, args, dtype=dtype, model=Path(folder)) for engine in args.engines]
            report(harness.run_rounds(engines, rounds=args.rounds), args, dtype=dtype)


def report(measured: dict[str, list[Measurement]], args: argparse.Namespace, *, dtype: str) -> None:
    useful = sum(map(sum, round_of(args)[1]))
    print(
        f"sampling, {args.size} model in {dtype}, {args.prompts} prompts x {args.group}, {useful} useful tokens, "
        f"{args.threads} threads, {args.rounds} rounds"
    )
    harness.print_machine(measured)
    comparisons = harness.compare(measured, key="tokens_per_s", ours="native", targets=TARGETS[dtype])
    harness.print_comparisons(comparisons, unit="useful tokens/s", ours="native")
    for name in ("native", "int8"):
        if name in measured:
            print(
                f"log-probs of {name}: {measured[name][0].values['logprob_gap']:.4f} from the learner's on average"
            )
    floor = None
    if "floor_s" in measured["native"][0].values:
        limit = useful / harness.spread(measured["native"], "floor_s").median
        floor = {
            "what": "the linear layers' products alone, as fast as torch's run",
            "limit": limit,
            "share": harness.spread(measured["native"], "tokens_per_s").median / limit,
            "target": None,
        }
        print(
            f"floor: {floor['what']}, would allow {limit:,.0f} useful tokens/s; native is at {floor['share']:.0%}"
        )
    if args.json:
        path = args.json if len(args.dtypes) == 1 else args.json.with_stem(f"{args.json.stem}-{dtype}")
        harness.write_json(
            path,
            measured=measured,
            comparisons=comparisons,
            unit="useful tokens/s",
            floor=floor,
            useful_tokens=useful,
        )


if __name__ == "__main__":
    main()
