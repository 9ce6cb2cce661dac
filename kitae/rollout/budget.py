"""How many pages of keys and values there may be: rows wait while they are used, and no row fails for want of one.

A group enters where its prompt fits and every row has room to go on for a while (AHEAD). If rows then grow beyond the
budget, those that entered last give their pages back and wait: they go on later from the tokens they have. A row that
could not even run alone is refused before anything is sampled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from kitae import backends
from kitae.errors import ConfigError
from kitae.rollout.base import Request
from kitae.rollout.pages import PAGE, Pages, PageStore
from kitae.types import Problem

SHARE = 0.5
"""Of the free memory, what pages may take where no setting says how much; ranks of one machine share it."""
AHEAD = 4
"""Pages that every row should find free when others enter: more of them let rows wait longer and be put back less often."""


class Budget:
    """The most pages of one session."""

    def __init__(self, pages: Pages, *, most: int, reason: str) -> None:
        """`reason` says where the limit is from, as the end of a sentence."""
        self._pages, self._most, self._reason = pages, most, reason
        self._promised = 0
        """Pages of groups that were told to enter and have not."""

    @property
    def most_tokens(self) -> int:
        """Keys and values of so many tokens fit."""
        return self._most * PAGE

    @property
    def num_left(self) -> int:
        """Pages that may still be taken."""
        return self._most - self._pages.num_in_use

    def require(self, problem: Problem, limit: int) -> None:
        """Refuse a completion of `limit` tokens that could not run alone."""
        length = len(problem.token_ids)
        if pages_of(length + limit - 1) > self._most:
            raise ConfigError(
                f"the prompt has {length} tokens and max_new_tokens is {limit}, but keys and values of "
                f"{self.most_tokens:,} tokens fit: {self._reason}; raise that, or lower max_new_tokens"
            )

    def admit(self, group: Sequence[Request], running: Sequence[Request]) -> int:
        """How many of the group may enter now beside those that run: all or none, or, where nothing runs, some."""
        left = self.num_left - self._promised - sum(min(AHEAD, _pages_to_come(r)) for r in running)
        shared, count = group[0].length // PAGE, 0
        for request in group:
            own = 1 + min(AHEAD, _pages_to_come(request))
            if shared + own > left and (count or running):
                break
            left, count = left - own, count + 1
        if count < len(group) and running:
            return 0
        self._promised += shared + count
        return count

    def settle(self) -> None:
        """What was told to enter takes its pages now."""
        self._promised = 0


def pages_of(num_tokens: int) -> int:
    """Pages that so many tokens fill or begin."""
    return -(-num_tokens // PAGE)


def most_pages(
    store: PageStore, *, device: torch.device, tokens: int | None, setting: str
) -> tuple[int, str]:
    """The most pages, and where the limit is from: `tokens`, the value of `setting`, or else a share of the free memory."""
    if tokens is not None:
        return tokens // PAGE, f"{setting} is {tokens:,}"
    free, _ = backends.of(device).memory(device)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    usable = int(free * SHARE) // ranks
    most = usable // (PAGE * store.bytes_per_token)
    return most, f"{usable >> 20:,} MiB of the free memory is theirs where {setting} does not say otherwise"


def _pages_to_come(request: Request) -> int:
    """Pages the row can still need; its last token's keys and values are never computed."""
    return max(pages_of(request.prompt_length + request.max_new_tokens - 1) - pages_of(request.length), 0)
