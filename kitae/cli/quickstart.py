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

from kitae.config import DataSettings, RewardSettings

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

    from kitae.cli import train
    from kitae.models.toy import make_model

    make_model(folder / "model", "qwen3", seed=args.seed, **MODEL_SIZES)
    stages = {}
    for recipe, settings in (
        ("sft", sft_settings(folder, seed=args.seed, steps=args.sft_steps)),
        ("grpo", grpo_settings(folder, seed=args.seed, rounds=args.grpo_rounds)),
    ):
        train.start(recipe, settings)
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


def sft_settings(folder: Path, *, seed: int, steps: int) -> dict[str, Any]:
    """The first stage; examples/quickstart-sft.toml is the same."""
    return {
        "output_dir": str(folder / "sft"),
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": [str(folder / "sft.jsonl")], "max_length": 128},
        "train": {"max_steps": steps, "per_device_train_batch_size": SFT_ROWS_PER_STEP, "seed": seed},
        "optim": {
            "learning_rate": 2e-3,
            "beta2": 0.99,
            "warmup_steps": 20,
            "lr_scheduler": "linear",
            "min_lr_ratio": 0.1,
        },
        "log": {"steps": 10},
    }


def grpo_settings(folder: Path, *, seed: int, rounds: int) -> dict[str, Any]:
    """The second stage; examples/quickstart-grpo.toml is the same."""
    return {
        "output_dir": str(folder / "grpo"),
        "model": {"name_or_path": str(folder / "sft")},
        "data": {"train": [str(folder / "grpo.jsonl")], "system_prompt": ""},
        "rollout": {
            "prompts_per_round": GRPO_PROMPTS,
            "num_generations": GRPO_GROUP,
            "max_new_tokens": MAX_NEW_TOKENS,
            "inference_batch_size": GRPO_PROMPTS * GRPO_GROUP,
            "rows_per_forward": GRPO_PROMPTS * GRPO_GROUP,
        },
        "train": {"max_steps": rounds, "seed": seed},
        "optim": {"learning_rate": 1e-4, "beta2": 0.95, "warmup_steps": 5, "lr_scheduler": "constant"},
    }


def evaluate_stage(model: Path, held_out: Path) -> dict[str, Any]:
    """Greedy answers to the held-out problems: a summary, and every record."""
    from kitae.cli._open import UseSettings, open_model
    from kitae.data.problems import RenderedProblems
    from kitae.data.sources import open_dataset
    from kitae.evaluate.accuracy import answer, summarise
    from kitae.rewards.pool import RewardPool

    use = UseSettings(
        model=str(model), temperature=0.0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS, batch_size=256
    )
    opened = open_model(use)
    dataset = open_dataset([str(held_out)], data=DataSettings(), purpose="rl", need_answer=True)
    problems = RenderedProblems(dataset, template=opened.template, max_prompt_length=64)
    sampling = use.sampling()
    records = []
    with RewardPool(RewardSettings()) as pool:
        for part in answer(opened.engine, list(problems), pool=pool, sampling=sampling, problems_at_once=512):
            records += part
    kept = ("accuracy", "low", "high", "format_rate", "mean_reward", "mean_length")
    summary = summarise(records)
    return {"summary": {name: summary[name] for name in kept}, "records": records}


def show(folder: Path, report: dict[str, Any], stages: dict[str, Any]) -> None:
    """The table, the curves, three completions before and after, and the next commands."""
    from rich.console import Console
    from rich.table import Table

    from kitae.cli._plot import Curve, draw_png, draw_text, side_by_side
    from kitae.errors import MissingExtraError

    console = Console()
    before, after = report["sft"], report["grpo"]
    table = Table(title=f"{len(stages['sft']['records'])} held-out problems, greedy")
    for column in ("", "after SFT", "after GRPO"):
        table.add_column(column, justify="left" if not column else "right")
    interval = "{accuracy:.1%}  [{low:.1%}, {high:.1%}]"
    table.add_row("accuracy (95 % interval)", interval.format(**before), interval.format(**after))
    table.add_row("right form", f"{before['format_rate']:.1%}", f"{after['format_rate']:.1%}")
    table.add_row("mean reward (0, 1 or 10)", f"{before['mean_reward']:.2f}", f"{after['mean_reward']:.2f}")
    table.add_row("mean length in tokens", f"{before['mean_length']:.1f}", f"{after['mean_length']:.1f}")
    console.print(table)

    steps = [json.loads(line) for line in (folder / "grpo" / "metrics.jsonl").read_text().splitlines()]
    curves = [
        Curve(title=title, points=[(s["step"], s[name]) for s in steps if name in s])
        for name, title in CURVES.items()
    ]
    console.print(side_by_side(*map(draw_text, curves)), highlight=False)
    try:
        draw_png(curves, folder / "curves.png", x_label="round")
        console.print(f"the same as a picture: {folder / 'curves.png'}")
    except MissingExtraError as error:
        console.print(f"no picture: {error}", highlight=False, markup=False)

    for first, last in list(zip(stages["sft"]["records"], stages["grpo"]["records"], strict=True))[:3]:
        console.print(f"\n{first['prompt']} = {first['answer']}", style="bold", highlight=False)
        for name, record in (("SFT ", first), ("GRPO", last)):
            console.print(f"  {name} {record['completion']}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"\nDone in {report['seconds']:.0f} s. Next:\n"
        f"  kitae chat {folder / 'grpo'}                 ask it a sum, such as 123+456\n"
        f"  tensorboard --logdir {folder}               look at the curves\n"
        f"  kitae train sft --help                         train your own",
        highlight=False,
        markup=False,
    )
