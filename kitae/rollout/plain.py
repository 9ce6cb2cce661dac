"""Rows of the generic engine where the attention seam is off: each group of rows has the model's own cache.

The rows of a group enter together and are equally long, so nothing is padded; a row that has ended is computed along
with its group until the last one ends.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kitae.models.policy import Policy
from kitae.rollout.base import Request, draw_tokens
from kitae.rollout.scheduler import Scheduler


class PlainRows:
    """See Rows in session.py."""

    def __init__(self, policy: Policy, *, stop_ids: frozenset[int]) -> None:
        self._policy, self._stop_ids = policy, stop_ids
        self._cache_name = cache_name(policy.causal_lm)
        self._groups: list[tuple[list[Request], Any]] = []
        """Rows that entered together, and their cache: any of transformers' classes."""

    def enter(self, groups: list[list[Request]]) -> None:
        """See Rows."""
        for group in groups:
            ids_BT = self._tensor([group[0].problem.token_ids]).expand(len(group), -1)
            self._groups.append((group, self._forward(ids_BT, group, cache=None)))

    def advance(self, scheduler: Scheduler, *, within_s: float | None) -> None:
        """One more token of every row that has not ended."""
        self._groups = [(group, cache) for group, cache in self._groups if any(map(is_running, group))]
        self._groups = [
            (group, self._forward(self._tensor([[r.token_ids[-1]] for r in group]), group, cache=cache))
            for group, cache in self._groups
        ]

    def leave(self, request: Request) -> None:
        """Its group's cache goes with the last row."""

    @torch.no_grad()
    def _forward(self, ids_BT: Tensor, group: list[Request], *, cache: Any) -> Any:
        with eval_mode(self._policy):
            out = self._policy.causal_lm(
                input_ids=ids_BT, use_cache=True, logits_to_keep=1, **{self._cache_name: cache}
            )
        running = [row for row, request in enumerate(group) if is_running(request)]
        draw_tokens(out.logits[running, -1].float(), [group[row] for row in running], stop_ids=self._stop_ids)
        return out[self._cache_name]

    def _tensor(self, values: list[list[int]]) -> Tensor:
        return torch.tensor(values, device=self._policy.device)


def is_running(request: Request) -> bool:
    return request.finish_reason is None


def cache_name(causal_lm: nn.Module) -> str:
    """What this model and transformers version call the argument and output that hold the cache."""
    parameters = inspect.signature(causal_lm.forward).parameters
    return next(name for name in ("cache", "past_key_values", "cache_params") if name in parameters)


@contextmanager
def eval_mode(policy: Policy) -> Iterator[None]:
    """No dropout while sampling; the policy's mode comes back."""
    was_training = policy.training
    if was_training:
        policy.eval()
    try:
        yield
    finally:
        if was_training:
            policy.train()
