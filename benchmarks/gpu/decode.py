"""Decode steps on a GPU: `python benchmarks/gpu/decode.py`; the paged engine beside the generic one, and the floor.

The model has the shapes of R1's distillation to 1.5B parameters, its weights are random. The floor is the time to read the
weights once, as fast as the device copies a large buffer (bytes read and written both counted).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCHMARKS)]

import harness  # noqa: E402

PROMPTS, PROMPT_TOKENS = 8, 40
COPY_BYTES = 4 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.5b", help="see chat_workload.py")
    parser.add_argument("--lora-ranks", type=int, nargs="+", default=[0, 16])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of a completion")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if any(rows < 1 or (rows > PROMPTS and rows % PROMPTS) for rows in options.rows):
        parser.error(f"--rows {options.rows} must be at most {PROMPTS} prompts, or their multiples")
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as folder:
        make = [sys.executable, str(BENCHMARKS / "chat_workload.py"), folder, "--size", options.size]
        subprocess.run([*make, "--rows", "8", "--device", options.device], check=True, stdout=sys.stderr)
        found = [one for rank in options.lora_ranks for one in measured(f"{folder}/model", rank, options)]
    header = ["rank", "rows", "engine", "ms a step", "tokens/s", "ms a step at the floor"]
    harness.print_table(header, [[str(one[key]) for key in header] for one in found])
    if options.json:
        report = {"machine": harness.machine(), "results": found}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measured(model: str, rank: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from kitae.config import LoraSettings, ModelSettings, SamplingSettings
    from kitae.models.load import load_policy
    from kitae.rollout.choose import open_engine
    from kitae.types import Problem

    settings = ModelSettings(name_or_path=model, dtype="bfloat16", device=options.device)
    lora = LoraSettings(rank=rank, alpha=2 * rank) if rank else LoraSettings()
    policy = load_policy(settings, lora=lora, trainable=bool(rank))
    floor = floor_ms(policy)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(10, policy.config.vocab_size, (PROMPTS, PROMPT_TOKENS), generator=drawn).tolist()
    found = []
    for name in ("paged", "generic"):
        engine = open_engine(
            policy,
            wanted=name,
            setting="engine",
            expected_tokens=1e9,
            stop_ids=[],
            decode=str,
            max_rows=max(options.rows),
        ).engine
        for rows in options.rows:
            group = max(1, rows // PROMPTS)
            problems = [Problem(prompt="", token_ids=x, index=i) for i, x in enumerate(ids[: rows // group])]
            how = SamplingSettings(max_new_tokens=options.tokens)
            engine.generate(problems, n=group, sampling=how, seed=0)  # compiles and records
            started = time.perf_counter()
            engine.generate(problems, n=group, sampling=how, seed=0)
            seconds = time.perf_counter() - started
            found.append(
                {
                    "rank": rank,
                    "rows": rows,
                    "engine": name,
                    "ms a step": round(1e3 * seconds / options.tokens, 2),
                    "tokens/s": round(rows * options.tokens / seconds),
                    "ms a step at the floor": round(floor, 2),
                }
            )
            print(found[-1], file=sys.stderr, flush=True)
    return found


def floor_ms(policy: Any) -> float:
    """Milliseconds to read all weights once."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=policy.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if policy.device.type != "cpu":
            torch.cuda.synchronize()

    bytes_per_s = 2 * COPY_BYTES / harness.median_seconds(copy, repeats=5)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    return 1e3 * weights / bytes_per_s


if __name__ == "__main__":
    main()
