"""The products of routed experts by themselves: kitae's kernels, one torch product per expert, and torch's grouped_mm.

Prints GFLOP/s in bfloat16 of y = x W^T, of x's gradient and of W's, for few experts and for many small ones; each shape
was computed before. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from harness import median_seconds
from torch import Tensor

from kitae.models import grouped
from kitae.models.grouped import Groups, Rows

TOKENS = 1408
"""Packed tokens of a typical step of sft.py."""
SHAPES = [(256, 192, 16, 4), (256, 192, 64, 8), (256, 96, 256, 8)]
"""Hidden size, an expert's inner size, experts, experts per token."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9, help="of each product; printed is the median")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for shape in SHAPES:
        measure(*shape, repeats=options.repeats)


@torch.no_grad()
def measure(hidden: int, inner: int, experts: int, each: int, *, repeats: int) -> None:
    expert_S, order_S = torch.rand(TOKENS, experts).topk(each).indices.flatten().sort(stable=True)
    sizes_E = torch.bincount(expert_S, minlength=experts)
    x_SH = torch.randn(TOKENS, hidden).bfloat16()[order_S // each]
    dy_SO = torch.randn(len(order_S), 2 * inner).bfloat16()
    weight_EOH = torch.randn(experts, 2 * inner, hidden).bfloat16()
    total_EOH = torch.zeros(experts, 2 * inner, hidden)
    ends_E = sizes_E.cumsum(0).int()
    contenders: dict[str, list[Callable[[], Tensor]]] = {
        "torch grouped_mm": [
            lambda: torch.nn.functional.grouped_mm(x_SH, weight_EOH.transpose(1, 2), offs=ends_E),
            lambda: torch.nn.functional.grouped_mm(dy_SO, weight_EOH, offs=ends_E),
        ]
    }
    for name, kernels in (("kernels", True), ("torch mm", False)):
        groups = Groups(sizes_E, sizes_E.tolist(), kernels)
        contenders[name] = [
            lambda groups=groups: grouped.product(Rows(x_SH), weight_EOH, groups),
            lambda groups=groups: grouped.back_product(Rows(dy_SO), weight_EOH, groups),
            lambda groups=groups: grouped.weight_gradient(Rows(dy_SO), Rows(x_SH), groups, add_to=total_EOH),
        ]
    flops = 2 * len(order_S) * hidden * 2 * inner
    print(f"{experts} experts of inner size {inner}, {each} a token:")
    for name, products in contenders.items():
        rates = [f"{flops / median_seconds(product, repeats=repeats) / 1e9:.0f}" for product in products]
        print(f"  {name}: {', '.join(rates)}")


if __name__ == "__main__":
    main()
