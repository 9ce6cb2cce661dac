"""The native engine's side of scaling.py: one curve of sampling, all its points in one process, as a line of JSON."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

GROUPS = [1, 2, 4, 8, 16]
GROUP_PROMPT, GROUP_LENGTH = 512, 32
QUEUES = [32, 64, 128, 250, 500, 1000]
QUEUE_PROMPT, QUEUE_LENGTH = 32, 32
MAX_ROWS = 128
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--curve", choices=["group", "queue"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()

    import torch

    from kitae.backends.cpu import CpuBackend
    from kitae.config import ModelSettings, SamplingSettings
    from kitae.models.load import load_policy
    from kitae.rollout.choose import open_engine
    from kitae.types import Problem

    torch.set_num_threads(options.threads)
    dtype = "bfloat16" if CpuBackend().supports("bfloat16")[0] else "float32"
    policy = load_policy(
        ModelSettings(name_or_path=str(options.model), dtype=dtype, device="cpu"), trainable=False
    )
    engine, _ = open_engine(
        policy,
        wanted="native",
        setting="engine",
        expected_tokens=1e9,
        stop_ids=[],
        decode=lambda ids: "",
        max_rows=MAX_ROWS,
    )
    draw = random.Random(0)

    def seconds(*, prompts: int, group: int, prompt_length: int, length: int) -> float:
        """The fastest of some rounds: what else the machine does only ever adds."""
        vocab_size = policy.config.vocab_size
        ids = [[draw.randrange(10, vocab_size) for _ in range(prompt_length)] for _ in range(prompts)]
        problems = [Problem(prompt="", token_ids=each, index=i) for i, each in enumerate(ids)]
        taken = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            engine.generate_up_to(
                [[length] * group] * prompts, problems=problems, sampling=SamplingSettings(), seed=0
            )
            taken.append(time.perf_counter() - started)
        return min(taken)

    seconds(prompts=1, group=1, prompt_length=8, length=2)
    if options.curve == "group":
        sizes = {"prompt_length": GROUP_PROMPT, "length": GROUP_LENGTH}
        lines = {
            "one prompt, G completions": [seconds(prompts=1, group=g, **sizes) for g in GROUPS],
            "G prompts, one completion each": [seconds(prompts=g, group=1, **sizes) for g in GROUPS],
        }
        x = GROUPS
    else:
        sizes = {"prompt_length": QUEUE_PROMPT, "length": QUEUE_LENGTH}
        lines = {
            "kitae": [1e3 * seconds(prompts=n, group=1, **sizes) / n / QUEUE_LENGTH for n in QUEUES],
        }
        x = QUEUES
    print(json.dumps({"x": x, "lines": lines}))


if __name__ == "__main__":
    main()
