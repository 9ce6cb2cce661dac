"""Adafactor: a second moment kept as the means of its rows and columns (arXiv:1804.04235, algorithm 4).

Steps are absolute (learning_rate as given, no parameter scaling), as the transformers Trainer uses it. A matrix
may be cut into shards of rows, one per rank: what spans the cut is summed over ranks in two collectives a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kitae.parallel.world import World

DECAY_POWER = -0.8
EPSILON = 1e-30
CLIP_THRESHOLD = 1.0


class Adafactor(torch.optim.Optimizer):
    """`world` is the ranks the parameters are sharded over along dimension 0: World() for whole parameters."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, world: World) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.world = world
        parameters = [p for group in self.param_groups for p in group["params"]]
        sizes = torch.tensor([[p.shape[0], p.numel()] for p in parameters], device=world.device)
        self.rows, self.numels = world.sum(sizes).unbind(1)
        """Of each whole parameter."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; the gradients are overwritten."""
        assert closure is None, "no closure: the gradient is there already"
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        for p, _ in pairs:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
        column_sums = [_square(p).sum(0) for p, _ in pairs if p.ndim == 2]
        column_sums = self._sum_over_ranks(column_sums)

        given = iter(column_sums)
        for (p, _), rows in zip(pairs, self.rows.tolist(), strict=True):
            columns = next(given) / rows if p.ndim == 2 else None
            self._to_update_(p, columns)
        square_sums = self._sum_over_ranks([p.grad.square().sum()[None] for p, _ in pairs])

        for (p, group), total, numel in zip(pairs, square_sums, self.numels.tolist(), strict=True):
            rms = (total / numel).sqrt()
            p.mul_(1.0 - group["lr"] * group["weight_decay"])
            p.sub_(p.grad.mul_(group["lr"] / (rms / CLIP_THRESHOLD).clamp(min=1.0)))

    def _to_update_(self, p: Tensor, column_means: Tensor | None) -> None:
        """Fold the gradient into the moments, and divide it by their root, in place."""
        assert p.grad is not None
        state = self.state[p]
        square = _square(p)
        if p.ndim == 1:
            moment = self._moved(state, "square", square)
            p.grad.mul_(moment.rsqrt())
            return
        row = self._moved(state, "row", square.mean(-1))
        column = self._moved(state, "column", square.mean(-2) if column_means is None else column_means)
        # The mean over rows of `row` is the mean over columns of `column`, which every shard knows.
        p.grad.mul_((row / column.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)).mul_(
            column.rsqrt().unsqueeze(-2)
        )

    def _moved(self, state: dict[str, Any], name: str, new: Tensor) -> Tensor:
        beta2 = 1.0 - state["step"] ** DECAY_POWER
        moment: Tensor = state.setdefault(name, torch.zeros_like(new))
        return moment.lerp_(new, 1.0 - beta2)

    def _sum_over_ranks(self, parts: list[Tensor]) -> list[Tensor]:
        if self.world.world_size == 1 or not parts:
            return parts
        flat = self.world.sum(torch.cat(parts))
        return list(torch.split(flat, [len(part) for part in parts]))


def _square(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad.square().add_(EPSILON)
