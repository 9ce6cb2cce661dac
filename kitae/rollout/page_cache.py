"""Keys and values of all layers in pages on one device, and what the attention seam calls while a sampler runs.

    prefill: packed prompts' keys and values --> their pages;  attention as in training
    step:    one token of every row --> its row's page;  attention over the row's pages

Dimension key besides types.py's: B rows, Q query heads, K key-value heads, D head size, P pages of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kitae.models import attention
from kitae.rollout.pages import PAGE
from kitae.types import Packing

Attend = Callable[..., Tensor]
"""As attend_slowly."""


class Step(NamedTuple):
    """Where the one token of every row is."""

    tables_BP: Tensor
    """The pages of each row, int32; entries behind the token's page are not read."""
    positions_B: Tensor
    places_B: Tensor
    """Which place of all pages' places the token has."""

    @classmethod
    def of(cls, tables_BP: Tensor, positions_B: Tensor) -> Step:
        pages_B = tables_BP.gather(1, (positions_B // PAGE)[:, None])[:, 0]
        return cls(tables_BP, positions_B, pages_B.long() * PAGE + positions_B % PAGE)


class PageCache:
    """A PageStore, and an AttentionCache over it; say what comes next by setting `coming`."""

    def __init__(self, config: Any, *, device: torch.device, dtype: torch.dtype, attend: Attend) -> None:
        _, self._heads, *sizes = attention.head_sizes(config)
        self._sizes = tuple(sizes)
        self._attend, self._device, self._dtype = attend, device, dtype
        num_layers = config.get_text_config().num_hidden_layers
        self.bytes_per_token = num_layers * self._heads * sum(sizes) * dtype.itemsize
        self._layers = [self._made(0) for _ in range(num_layers)]
        self.coming: Step | Tensor = torch.empty(0)
        """The next step, or the place of every token of the packed prompts that come next [T]."""

    def resize(self, count: int) -> None:
        """See PageStore; one layer after the other, so that few of them exist twice."""
        for number, old in enumerate(self._layers):
            if len(old[0]) >= count:
                return
            new = self._made(count)
            for before, after in zip(old, new, strict=True):
                after[: len(before)] = before
            self._layers[number] = new

    def copy(self, source: list[int], target: list[int]) -> None:
        """See PageStore."""
        here, there = (torch.tensor(pages, device=self._device) for pages in (source, target))
        for layer in self._layers:
            for pages in layer:
                pages[there] = pages[here]

    def attend(
        self, layer_idx: int, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packing: Packing, scaling: float
    ) -> Tensor:
        """See AttentionCache."""
        keys, values = self._layers[layer_idx]
        step = self.coming if isinstance(self.coming, Step) else None
        places = self.coming if isinstance(self.coming, Tensor) else self.coming.places_B
        keys.view(-1, *keys.shape[2:])[places] = k_TKD[: len(places)].to(self._dtype)
        values.view(-1, *values.shape[2:])[places] = v_TKD[: len(places)].to(self._dtype)
        if step is None:
            return attention.attend(q_TQD, k_TKD, v_TKD, packing, scaling=scaling)
        return self._attend(q_TQD, keys, values, step.tables_BP, step.positions_B, scaling)

    def _made(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [pages, PAGE, K, D]."""
        key, value = (
            torch.zeros(count, PAGE, self._heads, size, device=self._device, dtype=self._dtype)
            for size in self._sizes
        )
        return key, value


def attend_slowly(
    q_BQD: Tensor, keys: Tensor, values: Tensor, tables_BP: Tensor, positions_B: Tensor, scaling: float
) -> Tensor:
    """Attention [B, Q, D of values] of one token a row to the tokens of its pages up to itself; all pages are gathered."""
    k, v = (x[tables_BP.long()].flatten(1, 2).float() for x in (keys, values))  # [B, P x PAGE, K, D]
    rows, heads = q_BQD.shape[0], k.shape[2]
    q = q_BQD.float().view(rows, heads, -1, q_BQD.shape[-1])  # query heads that share a key-value head
    scores = torch.einsum("bkgd,btkd->bkgt", q, k) * scaling
    is_beyond = torch.arange(k.shape[1], device=q.device) > positions_B[:, None]
    weights = scores.masked_fill(is_beyond[:, None, None], -torch.inf).softmax(-1)
    out = torch.einsum("bkgt,btkd->bkgd", weights, v)
    return out.flatten(1, 2).to(q_BQD.dtype)
