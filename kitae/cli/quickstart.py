"""`kitae quickstart`: a small model learns by GRPO that thinking pays, in about three minutes on two CPU cores.

    random model --SFT--> knows the form, often answers without thinking, wrongly --GRPO--> thinks, and is right

The task is adding two 3-digit numbers. Half of the SFT rows show the carries inside <think>, half leave it empty: so
SFT teaches the form and leaves the choice open; only the reward says which habit is better.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kitae.config import RewardSettings, SamplingSettings

MODEL_SIZES = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "intermediate_size": 384, "initializer_range": 0.06, "max_position_embeddings": 512,
}  # fmt: skip
SFT_ROWS, SFT_ROWS_PER_STEP, SFT_STEPS = 6400, 48, 400
GRPO_PROMPTS, GRPO_GROUP, GRPO_ROUNDS = 16, 16, 60
HELD_OUT = 512
MAX_NEW_TOKENS = 80
CURVES = {"rollout/reward": "mean reward by round", "rollout/completion_length": "completion length by round"}


def main(argv: list[str]) -> int:
    """Run both stages, compare them on held-out problems, and say what to do next."""
    parser = argparse.ArgumentParser(prog="kitae quickstart", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output_dir", default="runs/quickstart", help="an earlier one is moved aside")
    parser.add_argument("--seed", type=int, default=0, help="seed of model, data and sampling")
    parser.add_argument("--sft_steps", type=int, default=SFT_STEPS, help="optimizer steps of the first stage")
    parser.add_argument("--grpo_rounds", type=int, default=GRPO_ROUNDS, help="rounds of the second stage")
    parser.add_argument("--held_out", type=int, default=HELD_OUT, help="problems neither stage has seen")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    folder = fresh_folder(Path(args.output_dir))
    write_data(folder, seed=args.seed, grpo_rounds=args.grpo_rounds, held_out=args.held_out)

    from kitae.models.toy import make_model
    from kitae.recipes._run import run_recipe

    make_model(folder / "model", "qwen3", seed=args.seed, **MODEL_SIZES)
    stages = {}
    for recipe, settings in (
        ("sft", sft_settings(folder, seed=args.seed, steps=args.sft_steps)),
        ("grpo", grpo_settings(folder, seed=args.seed, rounds=args.grpo_rounds)),
    ):
        run_recipe(recipe, settings)
        stages[recipe] = evaluate_stage(folder / recipe, folder / "held_out.jsonl")
    report = {name: stage["summary"] for name, stage in stages.items()}
    report["seconds"] = round(time.perf_counter() - started, 1)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show(folder, report, stages)
    return 0


def fresh_folder(folder: Path) -> Path:
    """Make the folder; one that exists is moved to NAME-<time of its last change>."""
    if folder.exists():
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.stat().st_mtime))
        moved = folder.with_name(f"{folder.name}-{stamp}")
        folder.rename(moved)
        print(f"moved the earlier {folder} to {moved}")
    folder.mkdir(parents=True)
    return folder


def problem(rng: random.Random) -> tuple[int, int]:
    return rng.randint(100, 999), rng.randint(100, 999)


def carries(a: int, b: int) -> str:
    """The written addition, digit by digit from the right. Example: 345 and 678 -> "5+8=13 4+7+1=12 3+6+1=10"."""
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return " ".join(steps)


def write_data(folder: Path, *, seed: int, grpo_rounds: int, held_out: int) -> None:
    """sft.jsonl, grpo.jsonl and held_out.jsonl; no held-out problem occurs in the other two."""
    rng = random.Random(seed)
    kept_back: dict[tuple[int, int], None] = {}
    while len(kept_back) < held_out:
        kept_back[problem(rng)] = None

    def fresh(count: int) -> Iterator[tuple[int, int]]:
        while count:
            numbers = problem(rng)
            if numbers not in kept_back:
                yield numbers
                count -= 1

    def sft_row(a: int, b: int) -> dict[str, str]:
        thinking = carries(a, b) if rng.random() < 0.5 else ""
        return {"prompt": f"{a}+{b}", "completion": f"<think>{thinking}</think><answer>{a + b}</answer>"}

    def question(a: int, b: int) -> dict[str, str]:
        return {"prompt": f"{a}+{b}", "answer": str(a + b)}

    write_rows(folder / "sft.jsonl", (sft_row(a, b) for a, b in fresh(SFT_ROWS)))
    write_rows(folder / "grpo.jsonl", (question(a, b) for a, b in fresh(GRPO_PROMPTS * grpo_rounds)))
    write_rows(folder / "held_out.jsonl", (question(a, b) for a, b in kept_back))


def write_rows(path: Path, rows: Iterator[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
