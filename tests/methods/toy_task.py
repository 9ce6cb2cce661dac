"""The toy task that every method learns: files and models a recipe's settings name by file name.

Everything is made from fixed seeds, so a golden trace means the same on every machine.

sft.jsonl       prompt "3+4", completion "<think>...</think><answer>7</answer>"
problems.jsonl  prompt, answer: the same sums, to sample from
pairs.jsonl     prompt, chosen, rejected: chosen is the right sum with many a, rejected a wrong one with none
labels.jsonl    prompt, completion, label: the pairs one by one
rewards.py      small_letters: the share of a to z in a completion, which any model can raise
model, teacher  random models with one tokenizer; the teacher is sure of what it says
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from kitae.models.toy import make_model

NUM_ROWS = 64
MODEL_SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "num_hidden_layers": 2,
}  # fmt: skip
STARTS = {"model": 0.2, "teacher": 0.6}
"""Size of the starting weights. With a frozen head an adapter is only as sure of a token as the head lets it."""
REWARDS = '''"""A reward that a random model can already raise."""


def small_letters(completion, *, prompt, answer, **columns):
    """Share of a to z among the characters of the completion."""
    return sum("a" <= c <= "z" for c in completion) / max(len(completion), 1)
'''


def make_files(folder: Path) -> Path:
    """Write everything of the list above into `folder`."""
    sums = list(_sums())
    pairs = list(_pairs(sums))
    _write(folder / "sft.jsonl", ({"prompt": p, "completion": _worked(p, answer)} for p, answer in sums))
    _write(folder / "problems.jsonl", ({"prompt": p, "answer": answer} for p, answer in sums))
    _write(folder / "pairs.jsonl", pairs)
    _write(
        folder / "labels.jsonl",
        (
            {"prompt": pair["prompt"], "completion": pair[column], "label": column == "chosen"}
            for pair in pairs
            for column in ("chosen", "rejected")
        ),
    )
    (folder / "rewards.py").write_text(REWARDS)
    for seed, (name, size) in enumerate(STARTS.items()):
        make_model(folder / name, "qwen3", seed=seed, initializer_range=size, **MODEL_SIZES)
    return folder


def _sums() -> Iterator[tuple[str, str]]:
    rng = random.Random(0)
    for _ in range(NUM_ROWS):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        yield f"{a}+{b}", str(a + b)


def _worked(prompt: str, answer: str) -> str:
    return f"<think>{prompt}={answer}</think><answer>{answer}</answer>"


def _pairs(sums: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    rng = random.Random(1)
    for prompt, answer in sums:
        chosen = "".join(rng.choices("ae", weights=(4, 1), k=rng.randint(5, 8)))
        rejected = "".join(rng.choices("bcd", k=rng.randint(3, 6)))
        wrong = str(int(answer) + rng.choice((-1, 1, 2)))
        yield {"prompt": prompt, "chosen": f"{answer} {chosen}", "rejected": f"{wrong} {rejected}"}


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
