"""TRL's and transformers' sides of startup.py, run by an interpreter that has trl and not kitae; their defaults."""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from startup_clock import process_began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=["trl", "trainer"], required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    options = parser.parse_args()
    ended = (trl if options.peer == "trl" else trainer)(options)
    names = ("trl", "transformers", "torch") if options.peer == "trl" else ("transformers", "torch")
    versions = {name: version(name) for name in names}
    print(json.dumps({"first_step_s": ended - process_began(), "versions": versions}))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(options.folder / options.peer),
        "per_device_train_batch_size": options.batch_size,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def rows_of(options: argparse.Namespace) -> Any:
    from datasets import load_dataset

    file = str(options.folder / "rows.jsonl")
    return load_dataset("json", data_files=file, split="train", cache_dir=str(options.folder / "hf"))


def first_step_ended(made: Any) -> float:
    """Train for one step, and say when it was over."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.time())

    made.add_callback(Clock())
    made.train()
    return ends[0]


def trl(options: argparse.Namespace) -> float:
    from trl import SFTConfig, SFTTrainer

    return first_step_ended(
        SFTTrainer(
            model=str(options.folder / "model"),
            args=SFTConfig(**settings(options)),
            train_dataset=rows_of(options),
        )
    )


def trainer(options: argparse.Namespace) -> float:
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    folder = str(options.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        return {"input_ids": tokenizer(text, truncation=True, max_length=1024)["input_ids"]}

    rows = rows_of(options)
    return first_step_ended(
        Trainer(
            model=AutoModelForCausalLM.from_pretrained(folder),
            args=TrainingArguments(**settings(options)),
            train_dataset=rows.map(tokenize, remove_columns=rows.column_names),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
    )


if __name__ == "__main__":
    main()
