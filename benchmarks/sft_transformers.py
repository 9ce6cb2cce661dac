"""transformers' Trainer in sft.py: padded batches, as its own examples train. Settings not named here are its defaults."""

from __future__ import annotations

import json
import math
import time
from importlib.metadata import version

import contender_options


def main() -> None:
    # The Trainer cuts no row, and none is longer than --max-length.
    options = contender_options.of_sft(__doc__, devices=("cpu",), quantizations=("none",)).parse_args()

    from datasets import load_dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(options.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype="float32")
    if options.lora_rank:
        from peft import LoraConfig, get_peft_model

        rank = options.lora_rank
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))

    def tokenized(row):
        """Token ids of a conversation; only the completion's are taught."""
        given = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
        return {"input_ids": whole, "labels": [-100] * len(given) + whole[len(given) :]}

    data = load_dataset(
        "json",
        data_files=str(options.folder / "rows.jsonl"),
        split="train",
        cache_dir=str(options.folder / "hf"),
    )
    data = data.map(tokenized, remove_columns=data.column_names)
    ends: list[tuple[float, int]] = []
    tokens = [0]

    class Counting(Trainer):
        def compute_loss(self, model, inputs, *arguments, **named):
            tokens[0] += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *arguments, **named)

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append((time.perf_counter(), tokens[0]))

    settings = {
        "output_dir": str(options.folder / "transformers"),
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps,
        "learning_rate": 2e-5,  # as the other contenders'
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if options.precision != "default":
        settings["bf16"] = options.precision == "bfloat16"
    config = TrainingArguments(**settings)
    trainer = Counting(
        model,
        config,
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Clock()],
    )
    result = trainer.train()
    (started, before), (ended, after) = ends[options.warmup - 1], ends[-1]
    timed_steps = options.steps - options.warmup
    assert math.isfinite(result.training_loss)
    print(
        json.dumps(
            {
                "tokens_per_s": (after - before) / (ended - started),
                "step_s": (ended - started) / timed_steps,
                "tokens_per_step": (after - before) / timed_steps,
                "loss": result.training_loss,
                "precision": f"{next(model.parameters()).dtype} weights, bf16 autocast {config.bf16}",
                "versions": {name: version(name) for name in ("transformers", "torch", "peft", "accelerate")},
            }
        )
    )


if __name__ == "__main__":
    main()
