"""From logits to a token, its log-probability, and the tokens it was chosen from.

    logits --repetition penalty, n-grams--> --temperature--> --top-k, top-p, min-p--> one uniform number --> token

The order is that of transformers. One number in [0, 1) per row and token and the inverse of the cumulative
distribution: whoever owns the numbers owns the randomness, and no row's token depends on another row.
Dimension key: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kitae.config import SamplingSettings

BLOCK = 256
"""Probabilities are summed in blocks of this many: the token is found in the blocks' sums, then in its block."""
FIRST_CANDIDATES = 256
"""top-p looks at this many of the likeliest tokens first, and at 8 times more while they do not suffice."""


class Draw(NamedTuple):
    """One sampled token per row."""

    token_ids: list[int]
    logprobs: list[float]
    kept_ids: list[list[int]] | None
    """Per row, the ids top-k, top-p and min-p left, in rising order; None where none of them was on."""


class Uniforms:
    """One completion's numbers in [0, 1), one for each token; they may be looked at before they are used."""

    def __init__(self, seed: int) -> None:
        self._source = random.Random(seed)
        self._ahead: list[float] = []

    def peek(self, count: int) -> list[float]:
        """The next numbers; they stay the next ones."""
        self._ahead += [self._source.random() for _ in range(count - len(self._ahead))]
        return self._ahead[:count]

    def take(self, count: int = 1) -> list[float]:
        """The next numbers, which are then used up."""
        taken = self.peek(count)
        del self._ahead[:count]
        return taken


class History:
    """What the penalties need of a row's past: the tokens seen, and what followed each run of n - 1 tokens."""

    def __init__(self, token_ids: Iterable[int], *, ngram_size: int) -> None:
        self._ngram_size = ngram_size
        self._last: tuple[int, ...] = ()
        self._followers: dict[tuple[int, ...], list[int]] = {}
        self._seen: dict[int, None] = {}
        for token in token_ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Take note of one more token."""
        self._seen[token] = None
        if self._ngram_size:
            if len(self._last) == self._ngram_size - 1:
                self._followers.setdefault(self._last, []).append(token)
            self._last = (*self._last, token)[-(self._ngram_size - 1) :] if self._ngram_size > 1 else ()

    @property
    def seen(self) -> list[int]:
        """The different tokens so far."""
        return list(self._seen)

    @property
    def banned(self) -> list[int]:
        """Tokens that would complete an n-gram for the second time."""
        return self._followers.get(self._last, [])


def draw(
    logits_BV: Tensor,
    *,
    sampling: SamplingSettings,
    uniforms: Sequence[float],
    histories: Sequence[History | None] = (),
) -> Draw:
    """Sample one token per row; `uniforms` holds a number in [0, 1) for each. The logits may be overwritten.

    Log-probabilities are those of the distribution drawn from. A greedy choice (temperature 0) is not random:
    its log-probability is the model's own, at temperature 1, and top-k, top-p and min-p change nothing.
    """
    for row, history in enumerate(histories):
        if history is not None:
            _penalize_(logits_BV[row], history, penalty=sampling.repetition_penalty)
    if sampling.temperature == 0:
        token_B = logits_BV.argmax(1)
        logprobs_B = logits_BV.log_softmax(1).gather(1, token_B[:, None])[:, 0]
        return Draw(token_B.tolist(), logprobs_B.tolist(), None)
    logits_BV.div_(sampling.temperature)
    is_truncated = truncate_(logits_BV, sampling)
    uniform_B = torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device)
    token_B, logprobs_B = inverse_cdf(logits_BV, uniform_B)
    return Draw(token_B.tolist(), logprobs_B.tolist(), _kept_ids(logits_BV) if is_truncated else None)


def top_logprobs(logits_V: Tensor, count: int) -> dict[int, float]:
    """The `count` likeliest ids with their log-probabilities, likeliest first, of logits that draw() has left."""
    found = logits_V.log_softmax(0).topk(min(count, len(logits_V)))
    return {
        i: logprob
        for i, logprob in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        if logprob > -math.inf
    }


def truncate_(logits_BV: Tensor, sampling: SamplingSettings) -> bool:
    """Set the logits that top-k, top-p and min-p drop to -inf, in place; False where none of them is on.

    Tokens as likely as the last one kept are kept too, so the set does not depend on how ties are sorted.
    """
    if 0 < sampling.top_k < logits_BV.shape[1]:
        _drop_below_(logits_BV, logits_BV.topk(sampling.top_k).values[:, -1:])
    if sampling.top_p < 1:
        _drop_below_(logits_BV, _top_p_threshold(logits_BV, sampling.top_p))
    if sampling.min_p > 0:
        # p >= min_p * max(p) is the same as logit >= max(logit) + log(min_p)
        largest_B1 = logits_BV.amax(1, keepdim=True)
        _drop_below_(logits_BV, largest_B1 + torch.tensor(sampling.min_p, dtype=torch.float64).log().item())
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0


def inverse_cdf(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative softmax of each row first exceeds its uniform number, and its log-prob."""
    num_rows, size = logits_BV.shape
    num_blocks = -(-size // BLOCK)
    largest_B1 = logits_BV.amax(1, keepdim=True)
    weights = logits_BV.new_zeros(num_rows, num_blocks * BLOCK)
    torch.sub(logits_BV, largest_B1, out=weights[:, :size]).exp_()
    weights = weights.view(num_rows, num_blocks, BLOCK)
    cumulative = weights.sum(2, dtype=torch.float64).cumsum(1)
    total_B1 = cumulative[:, -1:]
    target_B1 = uniform_B[:, None] * total_B1
    block_B1 = _first_above(cumulative, target_B1)
    before_B1 = F.pad(cumulative, (1, 0)).gather(1, block_B1)
    inside = weights[torch.arange(num_rows, device=weights.device), block_B1[:, 0]].double().cumsum(1)
    token_B1 = block_B1 * BLOCK + _first_above(inside, target_B1 - before_B1)
    logprob_B1 = (logits_BV.gather(1, token_B1) - largest_B1) - total_B1.log()
    return token_B1[:, 0], logprob_B1[:, 0]


def _first_above(cumulative: Tensor, target_B1: Tensor) -> Tensor:
    """Index of the first sum above the target; where rounding leaves none, of the last that still grew."""
    index_B1 = (cumulative <= target_B1).sum(1, keepdim=True)
    last_grown_B1 = (cumulative < cumulative[:, -1:]).sum(1, keepdim=True)
    return torch.minimum(index_B1, last_grown_B1)


def _penalize_(logits_V: Tensor, history: History, *, penalty: float) -> None:
    if penalty != 1:  # arXiv:1909.05858, section 4.1; both signs move away from the token
        seen = torch.tensor(history.seen, device=logits_V.device)
        logits = logits_V[seen]
        logits_V[seen] = torch.where(logits < 0, logits * penalty, logits / penalty)
    if history.banned:
        logits_V[torch.tensor(history.banned, device=logits_V.device)] = -torch.inf


def _top_p_threshold(logits_BV: Tensor, top_p: float) -> Tensor:
    """The smallest logit to keep: of the likeliest tokens, the one at which the mass before it is still < top_p."""
    total_B1 = logits_BV.logsumexp(1, keepdim=True)
    count = FIRST_CANDIDATES
    while True:
        count = min(count, logits_BV.shape[1])
        largest = logits_BV.topk(count).values
        mass = (largest - total_B1).exp().cumsum(1)
        if count == logits_BV.shape[1] or bool((mass[:, -1] >= top_p).all()):
            break
        count *= 8
    mass_before = F.pad(mass[:, :-1], (1, 0))
    last_kept_B1 = (mass_before < top_p).sum(1, keepdim=True) - 1
    return largest.gather(1, last_kept_B1.clamp_min(0))


def _drop_below_(logits_BV: Tensor, threshold_B1: Tensor) -> None:
    logits_BV.masked_fill_(logits_BV < threshold_B1, -torch.inf)


def _kept_ids(logits_BV: Tensor) -> list[list[int]]:
    kept_BV = logits_BV > -torch.inf
    return [kept_V.nonzero()[:, 0].tolist() for kept_V in kept_BV]
