"""TRL's side of sft.py, run by an interpreter that has trl and not kitae. Settings not named here are TRL's defaults."""

from __future__ import annotations

import json
import math
import time

import contender_options
import trl_shared
from harness import device_memory


def main() -> None:
    parser = contender_options.of_sft(__doc__)
    parser.add_argument("--variant", choices=["default", "packed", "padding_free"], required=True)
    parser.add_argument("--gradient-checkpointing", choices=["on", "off"])
    parser.add_argument("--liger", action="store_true", help="with Liger's kernels")
    options = parser.parse_args()

    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    settings = trl_shared.settings(
        options,
        folder="trl",
        device=options.device,
        per_device_train_batch_size=options.batch_size,
        max_length=options.max_length,
        use_liger_kernel=options.liger,
    )
    if options.variant == "packed":
        # A batch of one packed row: from its position ids transformers keeps conversations apart, so that the
        # gradient equals the unpacked one. Two such rows in a batch would attend across conversations.
        settings |= {"packing": True, "per_device_train_batch_size": 1}
    elif options.variant == "padding_free":
        settings |= {"padding_free": True, "max_length": None}
    if options.quantization == "nf4":
        import torch
        from transformers import BitsAndBytesConfig

        settings["model_init_kwargs"] = {
            "dtype": torch.bfloat16,
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_use_double_quant=True,
            ),
        }

    ends: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append((time.perf_counter(), trainer._total_train_tokens))

    config = SFTConfig(**settings)
    trainer = SFTTrainer(
        model=str(options.folder / "model"),
        args=config,
        train_dataset=trl_shared.rows(options, "rows.jsonl"),
        callbacks=[Clock()],
        peft_config=trl_shared.adapter(options),
    )
    result = trainer.train()
    (started, before), (ended, after) = ends[options.warmup - 1], ends[-1]
    assert math.isfinite(result.training_loss)
    print(
        json.dumps(
            {
                "tokens_per_s": (after - before) / (ended - started),
                "step_s": (ended - started) / (len(ends) - options.warmup),
                "tokens_per_step": (after - before) / (len(ends) - options.warmup),
                "loss": result.training_loss,
                **device_memory(options.device),
                **trl_shared.about(trainer, config),
            }
        )
    )


if __name__ == "__main__":
    main()
