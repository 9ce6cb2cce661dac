"""What top-p and its like kept: the learner renormalises over the ids that the sampler drew a token from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MASKED = torch.finfo(torch.float32).min
"""Logit of an id the sampler had dropped; finite, so that 0 x MASKED is 0."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The ids each prediction was drawn from, laid end to end; a prediction without any keeps the whole vocabulary."""

    prediction_L: Tensor
    id_L: Tensor
    first_N1: list[int]
    """Prediction n owns entries first_N1[n] up to first_N1[n + 1]."""
    is_free_N: Tensor

    @classmethod
    def of(cls, ids_N: Sequence[Sequence[int]], targets_N: Tensor) -> Kept:
        device = targets_N.device
        counts = torch.tensor([len(ids) for ids in ids_N])
        prediction_L = torch.repeat_interleave(torch.arange(len(ids_N)), counts).to(device)
        id_L = torch.tensor([i for ids in ids_N for i in ids], dtype=torch.long, device=device)
        is_free_N = (counts == 0).to(device)
        is_kept_N = is_free_N.clone()
        is_kept_N[prediction_L[id_L == targets_N[prediction_L]]] = True
        assert is_kept_N.all(), (
            f"targets outside their kept ids at {(~is_kept_N).nonzero().flatten().tolist()[:5]}"
        )
        return cls(prediction_L, id_L, [0, *counts.cumsum(0).tolist()], is_free_N)

    def mask_(self, logits_CV: Tensor, start: int, stop: int) -> None:
        """Mask the dropped ids in the rows of predictions start:stop; rows beyond them are left."""
        own = slice(self.first_N1[start], self.first_N1[stop])
        is_dropped_CV = torch.ones_like(logits_CV[: stop - start], dtype=torch.bool)
        is_dropped_CV[self.prediction_L[own] - start, self.id_L[own]] = False
        is_dropped_CV &= ~self.is_free_N[start:stop, None]
        logits_CV[: stop - start].masked_fill_(is_dropped_CV, MASKED)
