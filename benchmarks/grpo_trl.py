"""TRL's side of grpo.py, run by an interpreter that has trl and not kitae. Settings not named here are TRL's defaults."""

from __future__ import annotations

import json
import math
import statistics
import time

import trl_shared
from grpo_reward import rewards
from grpo_shared import parser, tokens_of
from harness import device_memory


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gradient-checkpointing", choices=["on", "off"])
    arguments.add_argument("--liger", action="store_true", help="with Liger's kernels")
    options = arguments.parse_args()

    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    settings = trl_shared.settings(
        options,
        folder="trl-grpo",
        device=options.device,
        per_device_train_batch_size=options.prompts * options.group,
        num_generations=options.group,
        max_completion_length=options.longest,
        learning_rate=1e-6,
        logging_steps=1,  # for the completions' lengths
        use_liger_kernel=options.liger,
    )
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
        train_dataset=trl_shared.rows(options, "questions.jsonl"),
        callbacks=[Clock()],
        peft_config=trl_shared.adapter(options),
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
                **trl_shared.about(trainer, config),
            }
        )
    )


if __name__ == "__main__":
    main()
