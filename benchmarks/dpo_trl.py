"""TRL's side of dpo.py, run by an interpreter that has trl and not kitae. Settings not named here are TRL's defaults."""

from __future__ import annotations

import json
import math
import time
from importlib.metadata import version

import contender_options


def main() -> None:
    parser = contender_options.parser(__doc__)
    parser.add_argument("--gradient-checkpointing", choices=["on", "off"])
    options = parser.parse_args()

    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    settings = {
        "output_dir": str(options.folder / "trl-dpo"),
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if options.precision != "default":
        settings["bf16"] = options.precision == "bfloat16"
    if options.gradient_checkpointing is not None:
        settings["gradient_checkpointing"] = options.gradient_checkpointing == "on"
    lora = None
    if options.lora_rank:
        from peft import LoraConfig

        lora = LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear")

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

    config = DPOConfig(**settings)
    trainer = DPOTrainer(
        model=str(options.folder / "model"),
        args=config,
        train_dataset=load_dataset(
            "json",
            data_files=str(options.folder / "pairs.jsonl"),
            split="train",
            cache_dir=str(options.folder / "hf"),
        ),
        callbacks=[Clock()],
        peft_config=lora,
    )
    result = trainer.train()
    elapsed = ends[-1] - ends[options.warmup - 1]
    assert math.isfinite(result.training_loss)
    print(
        json.dumps(
            {
                "pairs_per_s": (options.steps - options.warmup) * options.batch_size / elapsed,
                "loss": result.training_loss,
                "precision": f"{next(trainer.model.parameters()).dtype} weights, bf16 autocast {config.bf16}",
                "gradient_checkpointing": config.gradient_checkpointing,
                "versions": {name: version(name) for name in ("trl", "transformers", "torch", "peft")},
            }
        )
    )


if __name__ == "__main__":
    main()
