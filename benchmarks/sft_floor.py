"""The floor of sft.py: how long the matrix products of one training step take by themselves, nothing else computed."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

TOKENS = 1408
"""Packed tokens of a typical step: 8 rows of the workload, rounded up."""
TAUGHT = 1024
"""Of these, how many the vocabulary head sees."""
REPEATS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--precision", choices=["default", "float32", "bfloat16"], required=True)
    options = parser.parse_args()

    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    config = AutoConfig.from_pretrained(options.folder / "model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    seconds = flops = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows = TAUGHT if name == "lm_head" else TOKENS
            weight = torch.randn(module.out_features, module.in_features, dtype=dtype)
            inputs = torch.randn(rows, module.in_features, dtype=dtype)
            grads = torch.randn(rows, module.out_features, dtype=dtype)
            products: list[Callable[[], object]] = [
                lambda x=inputs, w=weight: x @ w.t(),
                lambda g=grads, w=weight: g @ w,
                lambda g=grads, x=inputs: g.t() @ x,
            ]
            seconds += sum(map(median_seconds, products))
            flops += 3 * 2 * rows * weight.numel()
    print(json.dumps({"tokens_per_s": TOKENS / seconds, "gflop_per_s": flops / seconds / 1e9}))


def median_seconds(product: Callable[[], object]) -> float:
    product()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        product()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
