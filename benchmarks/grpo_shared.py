"""What both sides of grpo.py share: their options, and how tokens are counted."""

from __future__ import annotations

import argparse
import json
import statistics

import contender_options


def parser(description: str | None) -> argparse.ArgumentParser:
    return contender_options.parser(
        description, counts=("prompts", "group", "longest"), devices=("cpu", "cuda")
    )


def tokens_of(options: argparse.Namespace, *, completion_length: float) -> float:
    """Prompt and completion tokens of one step, of which each is sampled from or trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.folder / "sampler")
    rows = [json.loads(line) for line in (options.folder / "questions.jsonl").read_text().splitlines()]
    rendered = (tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows)
    prompt_length = statistics.fmean(len(ids["input_ids"]) for ids in rendered)
    return options.prompts * options.group * (prompt_length + completion_length)
