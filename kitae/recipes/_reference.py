"""Models that score a round's tokens: the reference of a KL term, or the policy itself at the round's start.

rows --collate--> batches --Scorer--> log-probs --> one more stream of each row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from kitae.data.collate import empty_batch, with_stream
from kitae.models.policy import Policy
from kitae.parallel.world import World
from kitae.types import Batch, Row


class Scorer(Protocol):
    """Anything that scores batches."""

    def logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]: ...


class FrozenModel:
    """A second copy of a fully fine-tuned model, as it was before the run."""

    def __init__(self, policy: Policy, *, world: World) -> None:
        self._policy, self._world = policy.eval(), world

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Log-probabilities of each batch's predictions; ranks with fewer batches take part with empty ones."""
        missing = max(self._world.gather_json(len(batches))) - len(batches)
        return [self._policy(b).logprobs_N for b in [*batches, *[empty_batch()] * missing]][: len(batches)]


class Reference:
    """The frozen model that a KL term pulls towards, or any other that gives a round's tokens a stream of log-probs."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        collate: Callable[..., list[Batch]],
        stream: str = "ref_logprobs",
        renew: Callable[[], None] = lambda: None,
    ) -> None:
        """`collate(rows, temperature=...)` lays rows out as the training passes are."""
        self._scorer, self._collate, self._stream = scorer, collate, stream
        self.renew = renew
        """Lets the policy as it is now be the reference."""

    def annotate(self, groups: list[list[Row]], *, temperature: float) -> list[list[Row]]:
        """The groups with one more stream, scored at the temperature they were sampled at."""
        rows = [row for group in groups for row in group]
        batches = self._collate(rows, temperature=temperature)
        scored = iter(with_stream(rows, self._stream, batches, self._scorer.logprobs(batches)))
        return [[next(scored) for _ in group] for group in groups]
