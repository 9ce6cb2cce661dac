"""TRL's side of dpo.py, run by an interpreter that has trl and not kitae. Settings not named here are TRL's defaults."""

from __future__ import annotations

import json
import math
import time

import contender_options
import trl_shared


def main() -> None:
    parser = contender_options.parser(__doc__)
    parser.add_argument("--gradient-checkpointing", choices=["on", "off"])
    options = parser.parse_args()

    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    settings = trl_shared.settings(
        options, folder="trl-dpo", device="cpu", per_device_train_batch_size=options.batch_size
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

    config = DPOConfig(**settings)
    trainer = DPOTrainer(
        model=str(options.folder / "model"),
        args=config,
        train_dataset=trl_shared.rows(options, "pairs.jsonl"),
        callbacks=[Clock()],
        peft_config=trl_shared.adapter(options),
    )
    result = trainer.train()
    elapsed = ends[-1] - ends[options.warmup - 1]
    assert math.isfinite(result.training_loss)
    print(
        json.dumps(
            {
                "pairs_per_s": (options.steps - options.warmup) * options.batch_size / elapsed,
                "loss": result.training_loss,
                **trl_shared.about(trainer, config),
            }
        )
    )


if __name__ == "__main__":
    main()
