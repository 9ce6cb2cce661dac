"""What both sides of grpo.py share: their options, and how tokens are counted."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--folder", type=Path, required=True)
    made.add_argument("--precision", choices=["default", "float32", "bfloat16"], required=True)
    for count in ("prompts", "group", "longest", "steps", "warmup", "lora-rank"):
        made.add_argument(f"--{count}", type=int, required=True)
    made.add_argument("--device", choices=["cpu", "cuda"], required=True)
    return made


def tokens_of(options: argparse.Namespace, *, completion_length: float) -> float:
    """Prompt and completion tokens of one step, of which each is sampled from or trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.folder / "sampler")
    rows = [json.loads(line) for line in (options.folder / "questions.jsonl").read_text().splitlines()]
    rendered = (tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows)
    prompt_length = statistics.fmean(len(ids["input_ids"]) for ids in rendered)
    return options.prompts * options.group * (prompt_length + completion_length)
