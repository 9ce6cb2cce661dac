"""Sampling with the policy itself: any transformers model, through the same attention seam as training.

    admit groups -> prefill their prompts, packed -> first tokens -> one step for all rows -> tokens -> retire ...

A prompt is computed once for its group. A step is one packed row of one-token rows, and only the last positions
reach the vocabulary head. Where the attention seam is off, plain.py uses the model's own cache, group by group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kitae.models.policy import Policy
from kitae.rollout.base import Request, draw_tokens
from kitae.rollout.cache import Prompt, SlotCache
from kitae.rollout.plain import PlainRows, eval_mode
from kitae.rollout.scheduler import Scheduler, round_up_rows
from kitae.rollout.session import Rows, Session, sample_all, sample_groups
from kitae.types import Packing, Segment

log = logging.getLogger(__name__)

ROUND_TO = 64
"""Packed prompts are padded to a multiple of this many tokens, so that shapes repeat."""
ROWS_PER_HEAD = 128
"""Rows whose logits exist at the same time."""


class GenericEngine:
    """A RolloutEngine that calls the policy's own module; it always samples from the present weights."""

    def __init__(
        self, policy: Policy, *, stop_ids: Sequence[int], decode: Callable[[list[int]], str], max_rows: int
    ) -> None:
        self.policy = policy
        self.stop_ids = frozenset(stop_ids)
        self.decode = decode
        self.max_rows = max_rows
        if policy.seams.attention:
            log.info(
                "rollouts: generic engine, %d rows at a time, packed through the attention seam", max_rows
            )
        else:
            log.info(
                "rollouts: generic engine, group by group with the model's own cache (the attention seam is "
                "off for %s)",
                policy.causal_lm.config.model_type,
            )

    def sync(self) -> None:
        """Nothing to do: the weights are the policy's own."""

    generate = sample_groups
    generate_up_to = sample_all

    def open_session(self, *, max_rows: int | None = None, longest: int | None = None) -> Session:
        """See SessionEngine."""
        scheduler = Scheduler(max_rows=max_rows or self.max_rows)
        context = getattr(self.policy.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        rows: Rows
        if self.policy.seams.attention:
            rows = PackedRows(
                self.policy, num_slots=scheduler.num_slots, longest=longest or context, stop_ids=self.stop_ids
            )
        else:
            rows = PlainRows(self.policy, stop_ids=self.stop_ids)
        return Session(rows, scheduler, decode=self.decode, context=context)


class PackedRows:
    """Rows that the attention seam runs side by side, one packed row of one-token rows a step."""

    def __init__(
        self, policy: Policy, *, num_slots: int, longest: int | None, stop_ids: frozenset[int]
    ) -> None:
        self._policy, self._stop_ids = policy, stop_ids
        # bfloat16 products of one row with its keys are slower than float32 ones on a CPU.
        dtype = torch.float32 if policy.device.type == "cpu" else policy.dtype
        self._cache = SlotCache(num_slots=num_slots, max_length=longest, device=policy.device, dtype=dtype)

    def enter(self, groups: list[list[Request]]) -> None:
        """See Rows."""
        ids: list[int] = []
        positions: list[int] = []
        prompts: list[Prompt] = []
        for group in groups:
            prompt = group[0].problem.token_ids
            prompts.append(Prompt(len(ids), len(prompt), [r.slot for r in group]))
            ids += prompt
            positions += range(len(prompt))
        padding = [0] * (-len(ids) % ROUND_TO)
        packing = Packing(
            segments=[Segment(p.start, p.length) for p in prompts], num_tokens=len(ids) + len(padding)
        )
        self._cache.begin_prefill(prompts)
        last_tokens = [p.start + p.length - 1 for p in prompts for _ in p.slots]
        requests = [r for group in groups for r in group]
        self._draw(ids + padding, positions + padding, packing, last_tokens, requests)

    def advance(self, scheduler: Scheduler, *, within_s: float | None) -> None:
        """One more token of every running row. A slot without a row computes a token nobody reads."""
        self._cache.move(scheduler.compact())
        width = scheduler.width
        ids, positions = [0] * width, [0] * width
        for request in scheduler.running:
            ids[request.slot] = request.token_ids[-1]
            positions[request.slot] = request.length - 1
        packing = Packing(segments=[Segment(i, 1) for i in range(width)], num_tokens=width)
        self._cache.begin_step(positions)
        self._draw(ids, positions, packing, [r.slot for r in scheduler.running], scheduler.running)

    def leave(self, request: Request) -> None:
        """The next row that gets its slot overwrites it."""

    @torch.no_grad()
    def _draw(
        self,
        ids: list[int],
        positions: list[int],
        packing: Packing,
        places: list[int],
        requests: list[Request],
    ) -> None:
        """Compute the packed tokens, and each request's next one from the hidden state at the same index's place."""
        with eval_mode(self._policy):
            tensors = self._tensor(ids), self._tensor(positions)
            hidden_TH = self._policy.hidden(*tensors, packing, cache=self._cache)
            for first in range(0, len(requests), ROWS_PER_HEAD):
                rows = slice(first, first + ROWS_PER_HEAD)
                here = places[rows]
                padding = [here[-1]] * (round_up_rows(len(here)) - len(here))
                logits_BV = self._policy.logits(hidden_TH[self._tensor(here + padding)])
                draw_tokens(logits_BV[: len(here)], requests[rows], stop_ids=self._stop_ids)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._policy.device)
