"""kitae's side of grpo.py: the recipe as a user starts it. Settings not named here are kitae's defaults."""

from __future__ import annotations

import json
import statistics
from importlib.metadata import version
from pathlib import Path

from grpo_shared import parser, tokens_of
from harness import device_memory


def main() -> None:
    options = parser(__doc__).parse_args()

    import kitae

    output_dir = options.folder / "kitae-grpo"
    reward = Path(__file__).with_name("grpo_reward.py")
    kitae.train(
        "grpo",
        {
            "output_dir": str(output_dir),
            "overwrite": True,
            "model": {
                "name_or_path": str(options.folder / "sampler"),
                "device": options.device,
                "dtype": "auto" if options.precision == "default" else options.precision,
            },
            "lora": {"rank": options.lora_rank, "alpha": 2 * options.lora_rank} if options.lora_rank else {},
            "data": {"train": [str(options.folder / "questions.jsonl")]},
            "reward": {"function": f"{reward}:reward"},
            "rollout": {
                "prompts_per_round": options.prompts,
                "num_generations": options.group,
                "max_new_tokens": options.longest,
                # A user's run lasts long enough for the native engine to be chosen; this one may not.
                "engine": "native" if options.device == "cpu" else "auto",
            },
            "train": {"max_steps": options.steps},
            "optim": {"learning_rate": 1e-6},
        },
    )
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "rollout/completion_length" in line]
    assert len(steps) == options.steps, f"{len(steps)} of {options.steps} steps in metrics.jsonl"
    timed = steps[options.warmup :]
    elapsed = timed[-1]["time"] - steps[options.warmup - 1]["time"]
    length = statistics.fmean(step["rollout/completion_length"] for step in timed)
    step_s = elapsed / len(timed)
    log = (output_dir / "train.log").read_text().splitlines()
    print(
        json.dumps(
            {
                "tokens_per_s": tokens_of(options, completion_length=length) / step_s,
                "step_s": step_s,
                "completion_length": length,
                "reward": statistics.fmean(step["rollout/reward"] for step in timed),
                **device_memory(options.device),
                "precision": next(line.split(" INFO ")[1] for line in log if " INFO dtype " in line),
                "versions": {name: version(name) for name in ("kitae", "transformers", "torch", "peft")},
            }
        )
    )


if __name__ == "__main__":
    main()
