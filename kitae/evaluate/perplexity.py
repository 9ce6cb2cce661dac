"""Loss and perplexity of rows that are already written: how surprised the model is by what it should say.

rows --collate--> batches --logprobs--> LossRecord per row --summarise--> loss per token, perplexity
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from kitae.data.collate import collate
from kitae.models.policy import Policy
from kitae.types import Batch, Row

Logprobs = Callable[[Sequence[Batch]], list[Tensor]]
"""Log-probabilities of each batch's predictions: `Learner.logprobs`, or `scorer(policy)`."""


class LossRecord(TypedDict):
    """One row's loss."""

    row: int
    loss_sum: float
    """Negative log-likelihood in nats, summed over the row's taught tokens."""
    num_tokens: int
    columns: dict[str, Any]


def scorer(policy: Policy) -> Logprobs:
    """Logprobs of a policy that is not being trained."""

    @torch.no_grad()
    def logprobs(batches: Sequence[Batch]) -> list[Tensor]:
        policy.eval()
        return [policy(batch).logprobs_N for batch in batches]

    return logprobs


def score(
    rows: Sequence[Row],
    *,
    logprobs: Logprobs,
    rows_per_forward: int = 8,
    columns: Sequence[dict[str, Any]] | None = None,
) -> Iterator[list[LossRecord]]:
    """The rows' losses, yielded forward pass by forward pass; `columns` are their data columns, one dict per row."""
    for start in range(0, len(rows), rows_per_forward):
        (batch,) = collate(rows[start : start + rows_per_forward], rows_per_forward=rows_per_forward)
        (logprobs_N,) = logprobs([batch])
        loss_B = torch.zeros(batch.num_rows, dtype=torch.float64)
        loss_B.index_add_(0, batch.row_N, -logprobs_N.double().cpu())
        yield [
            {
                "row": start + i,
                "loss_sum": float(loss_B[i]),
                "num_tokens": row.num_taught,
                "columns": columns[start + i] if columns is not None else {},
            }
            for i, row in enumerate(batch.rows)
        ]


def summarise(records: Iterable[LossRecord]) -> dict[str, float]:
    """Loss per token over all rows together, and its exponential. Every token counts alike, however long its row."""
    records = list(records)
    tokens = sum(record["num_tokens"] for record in records)
    summary: dict[str, float] = {"rows": len(records), "tokens": tokens}
    if tokens:
        loss = math.fsum(record["loss_sum"] for record in records) / tokens
        summary |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return summary
