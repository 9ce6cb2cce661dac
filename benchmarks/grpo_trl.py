"""TRL's side of grpo.py, run by an interpreter that has trl and not kitae. Settings not named here are TRL's defaults."""

from __future__ import annotations

import json
import math
import statistics
import time
from importlib.metadata import version

from grpo_reward import rewards
from grpo_shared import parser, tokens_of
from harness import device_memory


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gradient-checkpointing", choices=["on", "off"])
    arguments.add_argument("--liger", action="store_true", help="with Liger's kernels")
    options = arguments.parse_args()

    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    settings = {
        "output_dir": str(options.folder / "trl-grpo"),
        "per_device_train_batch_size": options.prompts * options.group,
        "num_generations": options.group,
        "max_completion_length": options.longest,
        "max_steps": options.steps,
        "learning_rate": 1e-6,
        "logging_steps": 1,  # for the completions' lengths
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": options.device == "cpu",
        "use_liger_kernel": options.liger,
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
    logged: list[dict] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "completions/mean_length" in logs:
                logged.append(logs)

    config = GRPOConfig(**settings)
    trainer = GRPOTrainer(
        model=str(options.folder / "sampler"),
        reward_funcs=rewards,
        args=config,
        train_dataset=load_dataset(
            "json",
            data_files=str(options.folder / "questions.jsonl"),
            split="train",
            cache_dir=str(options.folder / "hf"),
        ),
        callbacks=[Clock()],
        peft_config=lora,
    )
    result = trainer.train()
    timed = logged[options.warmup :]
    step_s = (ends[-1] - ends[options.warmup - 1]) / (options.steps - options.warmup)
    length = statistics.fmean(logs["completions/mean_length"] for logs in timed)
    assert math.isfinite(result.training_loss) and len(logged) == options.steps
    print(
        json.dumps(
            {
                "tokens_per_s": tokens_of(options, completion_length=length) / step_s,
                "step_s": step_s,
                "completion_length": length,
                "reward": statistics.fmean(logs["reward"] for logs in timed),
                **device_memory(options.device),
                "precision": f"{next(trainer.model.parameters()).dtype} weights, bf16 autocast {config.bf16}",
                "gradient_checkpointing": config.gradient_checkpointing,
                "versions": {name: version(name) for name in ("trl", "transformers", "torch", "peft")},
            }
        )
    )


if __name__ == "__main__":
    main()
