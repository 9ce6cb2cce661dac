"""Continuous batching in plain Python: who runs, in which slot, and who enters next. It knows no tensors.

    waiting groups --admit--> running rows --retire--> free slots --compact--> rows in the lowest slots

A group enters whole, so that its prompt is computed once; one too large for that enters in parts. The cost of a
step depends on the rows in flight, never on how many wait.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence

from kitae.rollout.base import Request

PARTS = 4
"""A group larger than all slots is cut so that about this many parts run at a time: one ends, the next enters."""
ENTER_AT = 8
"""Nobody enters before an eighth of the rows is free, so that many prompts share one prefill."""

FEWER = 4
"""Prompts that somebody waits for are computed so much fewer at a time, and their first tokens come sooner."""

HowMany = Callable[[Sequence[Request], Sequence[Request]], int]
"""How many of a group memory has room for, beside those that run."""


class Scheduler:
    """Rows in flight and groups that wait, first come, first served."""

    def __init__(
        self, *, max_rows: int, max_prefill_tokens: int = 4096, room: HowMany = lambda group, _: len(group)
    ) -> None:
        """At most `max_rows` rows run at a time; prompts admitted together have at most `max_prefill_tokens`."""
        assert max_rows >= 1, max_rows
        self._room = room
        self.running: list[Request] = []
        """Rows of one group are neighbours, groups in the order they entered."""
        self._waiting: deque[list[Request]] = deque()
        self.num_slots = round_up_rows(max_rows)
        self._free = list(range(self.num_slots))  # a heap: the lowest slot is taken first
        self._max_rows = max_rows
        self._max_prefill_tokens = max_prefill_tokens

    def add(self, group: Sequence[Request]) -> None:
        """Queue the rows of one prompt."""
        size = self._max_rows if len(group) <= self._max_rows else max(1, self._max_rows // PARTS)
        self._waiting += [list(group[start : start + size]) for start in range(0, len(group), size)]

    @property
    def num_waiting(self) -> int:
        return sum(request.finish_reason is None for group in self._waiting for request in group)

    @property
    def is_done(self) -> bool:
        return not self.running and not self._waiting

    def admit(self, *, at_once: bool = False) -> list[list[Request]]:
        """Groups that enter now, slots given; empty when none fits. Call again: prefill has its own limit.

        `at_once`: somebody waits for them. They wait for no others, and only a few enter together.
        """
        entering: list[list[Request]] = []
        tokens = 0
        if not at_once and self._max_rows - len(self.running) < self._max_rows // ENTER_AT:
            return entering
        while self._waiting and len(self.running) + len(self._waiting[0]) <= self._max_rows:
            tokens += self._waiting[0][0].length
            if entering and tokens > self._max_prefill_tokens // (FEWER if at_once else 1):
                break
            group = [r for r in self._waiting.popleft() if r.finish_reason is None]  # others were cancelled
            if not group:
                continue
            count = self._room(group, self.running)
            if count < len(group):
                self._waiting.appendleft(group[count:])
            if count == 0:
                break
            for request in group[:count]:
                request.slot = heapq.heappop(self._free)
            entering.append(group[:count])
            self.running += group[:count]
        return entering

    def put_back(self) -> Request:
        """Let the row that entered last wait again; it will go on from its tokens."""
        request = self.running.pop()
        heapq.heappush(self._free, request.slot)
        self._waiting.appendleft([request])
        return request

    def retire(self) -> list[Request]:
        """Take finished rows out; their slots are free."""
        gone = [r for r in self.running if r.finish_reason is not None]
        if gone:
            self.running = [r for r in self.running if r.finish_reason is None]
            for request in gone:
                heapq.heappush(self._free, request.slot)
        return gone

    def compact(self) -> list[tuple[int, int]]:
        """Move rows down until all slots in use are below width; returns (from, to) pairs."""
        moves = []
        for request in self.running:
            if request.slot >= self.width:
                target = heapq.heappop(self._free)
                heapq.heappush(self._free, request.slot)
                moves.append((request.slot, target))
                request.slot = target
        return moves

    @property
    def width(self) -> int:
        """How many slots a decode step covers: the running rows, rounded up so that few shapes occur."""
        return round_up_rows(len(self.running))


def round_up_rows(count: int) -> int:
    """1, 2, 4, 8, then multiples of 8: libraries prepare every matrix shape anew."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8
