"""kitae's side of dpo.py: the recipe as a user starts it. Settings not named here are kitae's defaults."""

from __future__ import annotations

import json
import statistics
import time
from importlib.metadata import version

import contender_options


def main() -> None:
    options = contender_options.parser(__doc__).parse_args()

    import kitae
    from kitae.recipes._preference import ReferenceCache

    reference_s = [0.0]
    prepare = ReferenceCache.prepare

    def timed(*arguments, **named):
        began = time.perf_counter()
        prepare(*arguments, **named)
        reference_s[0] += time.perf_counter() - began

    ReferenceCache.prepare = timed
    output_dir = options.folder / "kitae-dpo"
    kitae.train(
        "dpo",
        {
            "output_dir": str(output_dir),
            "overwrite": True,
            "model": {
                "name_or_path": str(options.folder / "model"),
                "device": "cpu",
                "dtype": "auto" if options.precision == "default" else options.precision,
            },
            "lora": {"rank": options.lora_rank, "alpha": 2 * options.lora_rank} if options.lora_rank else {},
            "data": {"train": [str(options.folder / "pairs.jsonl")], "max_length": 1024},
            "train": {"per_device_train_batch_size": options.batch_size, "max_steps": options.steps},
            "optim": {"learning_rate": 1e-6, "lr_scheduler": "linear", "warmup_ratio": 0.0},
        },
    )
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == options.steps, f"{len(steps)} of {options.steps} steps in metrics.jsonl"
    timed_steps = options.steps - options.warmup
    # Scoring by the reference happens before step 1; the timed steps bear their share of it.
    elapsed = steps[-1]["time"] - steps[options.warmup - 1]["time"]
    elapsed += reference_s[0] * timed_steps / options.steps
    log = (output_dir / "train.log").read_text().splitlines()
    print(
        json.dumps(
            {
                "pairs_per_s": timed_steps * options.batch_size / elapsed,
                "loss": statistics.fmean(step["train/loss"] for step in steps),
                "reference_s": reference_s[0],
                "precision": next(line.split(" INFO ")[1] for line in log if " INFO dtype " in line),
                "versions": {name: version(name) for name in ("kitae", "transformers", "torch", "peft")},
            }
        )
    )


if __name__ == "__main__":
    main()
