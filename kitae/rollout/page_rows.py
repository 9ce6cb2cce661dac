"""Rows whose keys and values lie in pages: how prompts enter, share, grow, wait again and leave, on any device.

groups --compute each prompt once--> its pages --share--> rows --room for the next steps, or wait again--> ... --> free
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from kitae.models.native import check_ids
from kitae.rollout.base import Request
from kitae.rollout.budget import Budget, pages_of
from kitae.rollout.pages import PAGE, Pages
from kitae.rollout.scheduler import Scheduler
from kitae.rollout.session import STREAM_S

STEPS_PER_CALL = 16
"""Decode steps before Python looks at the tokens."""


class PageRows(ABC):
    """See Rows in session.py; what computes is in native.py and paged.py."""

    def __init__(
        self, pages: Pages, budget: Budget, *, stop_ids: frozenset[int], num_embeddings: int
    ) -> None:
        self._pages, self._budget = pages, budget
        self._stop_ids, self._num_embeddings = stop_ids, num_embeddings
        self._pages_of: dict[Request, list[int]] = {}
        self._step_s = STREAM_S  # of the last call; the first one takes one step

    @abstractmethod
    def _prefill(self, prompts: list[list[int]], known: list[int], tables: list[list[int]]) -> None:
        """Compute the prompts but for their first `known` tokens, and keep the logits of each one's last token."""

    @abstractmethod
    def _draw(self, requests: list[Request], logits_row: list[int]) -> None:
        """Draw each request's token from its row of the logits kept last; one row may serve several requests."""

    @abstractmethod
    def advance(self, scheduler: Scheduler, *, within_s: float | None) -> None:
        """See Rows."""

    def leave(self, request: Request) -> None:
        """See Rows."""
        pages = self._pages_of.pop(request)
        # The last token was sampled and not computed.
        self._pages.prefixes.keep(request.problem.token_ids + request.token_ids[:-1], pages)
        self._pages.give_back(pages)

    @torch.no_grad()
    def enter(self, groups: list[list[Request]]) -> None:
        """Compute each group's prompt once, share its pages, and sample the next token of all its rows."""
        self._budget.settle()
        # A row that was put back has tokens already, and is a group of its own.
        prompts = [group[0].problem.token_ids + group[0].token_ids for group in groups]
        check_ids(torch.tensor([i for prompt in prompts for i in prompt]), self._num_embeddings)
        known, tables = [], []
        for prompt in prompts:
            found = self._pages.prefixes.find(prompt)
            self._pages.share(found, readers=1)
            table = found + self._pages.take(pages_of(len(prompt)) - len(found))
            self._pages.prefixes.keep(prompt, table)  # for the prompts after it, too
            known.append(len(found) * PAGE)
            tables.append(table)
        self._prefill(prompts, known, tables)
        requests = [request for group in groups for request in group]
        logits_row = [number for number, group in enumerate(groups) for _ in group]
        self._share(groups, prompts, tables)
        self._draw(requests, logits_row)

    def _share(self, groups: list[list[Request]], prompts: list[list[int]], tables: list[list[int]]) -> None:
        """Every row reads its prompt's full pages; the last one, if it is not full, is copied for all but the first."""
        source: list[int] = []
        target: list[int] = []
        for group, prompt, table in zip(groups, prompts, tables, strict=True):
            num_full = len(prompt) // PAGE
            self._pages.share(table[:num_full], readers=len(group) - 1)
            self._pages_of[group[0]] = table
            for request in group[1:]:
                own = self._pages.take(len(table) - num_full)
                source += table[num_full:]
                target += own
                self._pages_of[request] = table[:num_full] + own
        self._pages.copy(source, target)

    def _most_steps(self, requests: Sequence[Request], *, within_s: float | None) -> int:
        """Decode steps until one of the rows has all its tokens, and not too many, nor longer than `within_s`."""
        steps = min(STEPS_PER_CALL, *(r.max_new_tokens - len(r.token_ids) for r in requests))
        return steps if within_s is None else min(steps, max(1, int(within_s / self._step_s)))

    def _make_room(self, scheduler: Scheduler, *, steps: int) -> int:
        """Pages for so many steps of every row. Where there are too few, for fewer; where for none, some rows wait again."""
        while True:  # the token fed at step k lies at position length - 1 + k
            missing = {
                request: max(pages_of(request.length - 1 + steps) - len(self._pages_of[request]), 0)
                for request in scheduler.running
            }
            if sum(missing.values()) <= self._budget.num_left:
                break
            if steps > 1:
                steps = steps // 2
            else:
                self.leave(scheduler.put_back())
        for request, count in missing.items():
            self._pages_of[request] += self._pages.take(count)
        return steps


def needs_logits(request: Request) -> bool:
    """Whether draw_tokens has to see every step's logits: for penalties, the likeliest tokens, or a form to be kept."""
    s = request.sampling
    has_penalty = s.repetition_penalty != 1 or s.no_repeat_ngram_size > 0
    return has_penalty or request.num_top_logprobs > 0 or request.constraint is not None


def as_table(pages: list[list[int]], *, width: int) -> Tensor:
    """Page numbers [rows, width]; what a row has not is 0 and not read."""
    return torch.tensor([own + [0] * (width - len(own)) for own in pages], dtype=torch.int32)
