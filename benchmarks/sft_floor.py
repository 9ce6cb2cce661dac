"""The floor of sft.py: tokens per second if all of the model's arithmetic ran as fast as its matrix products run alone.

    linears' products at the step's shapes --timed, nothing else computed--> rate
    arithmetic of a token: 6 operations per weight it meets, 12 per number of a head and token it sees (arXiv:2204.02311, B)

A product's rate, the mean step's tokens and how many a token sees are measured; padding is not counted as work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from harness import median_seconds

REPEATS = 9
ROUND_TO = 64
"""Rows of the timed products are a multiple of it: the rate is not to suffer from an odd shape."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--precision", choices=["default", "float32", "bfloat16"], required=True)
    parser.add_argument("--tokens", type=float, required=True, help="of a step, padding left out")
    parser.add_argument("--taught-share", type=float, required=True, help="of them, seen by the head")
    parser.add_argument(
        "--seen", type=float, required=True, help="tokens that a token attends to, on average"
    )
    options = parser.parse_args()

    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    config = AutoConfig.from_pretrained(options.folder / "model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    seconds = operations = 0.0
    per_token = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * options.seen
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            share = options.taught_share if name == "lm_head" else 1.0
            rows = max(round(options.tokens * share / ROUND_TO), 1) * ROUND_TO
            weight = torch.randn(module.out_features, module.in_features, dtype=dtype)
            inputs = torch.randn(rows, module.in_features, dtype=dtype)
            grads = torch.randn(rows, module.out_features, dtype=dtype)
            products: list[Callable[[], object]] = [
                lambda x=inputs, w=weight: x @ w.t(),
                lambda g=grads, w=weight: g @ w,
                lambda g=grads, x=inputs: g.t() @ x,
            ]
            seconds += sum(median_seconds(product, repeats=REPEATS) for product in products)
            operations += 6 * rows * weight.numel()
            per_token += 6 * share * weight.numel()
    rate = operations / seconds
    print(json.dumps({"tokens_per_s": rate / per_token, "gflop_per_s": rate / 1e9}))


if __name__ == "__main__":
    main()
