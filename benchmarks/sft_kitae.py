"""kitae's side of sft.py: the recipe as a user starts it. Settings not named here are kitae's defaults."""

from __future__ import annotations

import json
import statistics
from importlib.metadata import version

import contender_options
from harness import device_memory


def main() -> None:
    parser = contender_options.of_sft(__doc__)
    parser.add_argument("--gradient-checkpointing", choices=["on", "off"], default="off")
    options = parser.parse_args()

    import kitae

    output_dir = options.folder / "kitae"
    kitae.train(
        "sft",
        {
            "output_dir": str(output_dir),
            "overwrite": True,
            "model": {
                "name_or_path": str(options.folder / "model"),
                "device": options.device,
                "dtype": "auto" if options.precision == "default" else options.precision,
                "quantization": options.quantization,
                "gradient_checkpointing": options.gradient_checkpointing == "on",
            },
            "lora": {"rank": options.lora_rank, "alpha": 2 * options.lora_rank} if options.lora_rank else {},
            "data": {
                "train": [str(options.folder / "rows.jsonl")],
                "target": "as_is",
                "max_length": options.max_length,
            },
            "train": {"per_device_train_batch_size": options.batch_size, "max_steps": options.steps},
        },
    )
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "perf/tokens_per_s" in line]
    assert len(steps) == options.steps, f"{len(steps)} of {options.steps} steps in metrics.jsonl"
    timed = steps[options.warmup :]
    # Wall clock from the end of the last warm-up step: what happens between steps counts too.
    elapsed = timed[-1]["time"] - steps[options.warmup - 1]["time"]
    tokens = sum(round(step["perf/tokens_per_s"] * step["time/step_s"]) for step in timed)
    log = (output_dir / "train.log").read_text().splitlines()
    print(
        json.dumps(
            {
                "tokens_per_s": tokens / elapsed,
                "step_s": elapsed / len(timed),
                "tokens_per_step": tokens / len(timed),
                "loss": statistics.fmean(step["train/loss"] for step in steps),
                **device_memory(options.device),
                "precision": next(line.split(" INFO ")[1] for line in log if " INFO dtype " in line),
                "versions": {name: version(name) for name in ("kitae", "transformers", "torch", "peft")},
            }
        )
    )


if __name__ == "__main__":
    main()
