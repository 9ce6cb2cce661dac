"""Sampling while the policy trains: an engine with weights of its own, whose round goes on in a thread.

    sync: the weights as they are now --begin--> a thread samples, the policy trains --result--> rollouts

One round runs at a time. What it samples depends on the weights at sync() alone, not on what either thread is doing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from kitae.models.policy import Policy
from kitae.rollout.base import OnRollout
from kitae.rollout.choose import LocalEngine
from kitae.types import Problem, Rollout


class BackgroundEngine:
    """A RolloutEngine whose generate() can also be begun now and waited for later."""

    def __init__(self, engine: LocalEngine, *, source: Policy) -> None:
        """`engine` was opened with load_copy; `source` is the policy that trains."""
        self._engine, self._source = engine, source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kitae-rollout")
        self._running: Future[list[list[Rollout]]] | None = None
        self._is_closed = threading.Event()

    @torch.no_grad()
    def sync(self) -> None:
        """Take over the policy's present weights, which must be whole on this rank, once what runs has ended."""
        self._wait()
        own = self._engine.policy
        if own is not self._source:
            for name, theirs in self._source.named_trainable():
                own.causal_lm.get_parameter(name).copy_(theirs)
        self._engine.sync()

    def generate(self, problems: Sequence[Problem], **how: Any) -> list[list[Rollout]]:
        """See RolloutEngine, whose keyword arguments `how` are; what runs ends before."""
        self._wait()
        return self._engine.generate(problems, **how)

    def begin(
        self, problems: Sequence[Problem], *, on_rollout: OnRollout, **how: Any
    ) -> Future[list[list[Rollout]]]:
        """The same in a thread, which also calls on_rollout."""
        self._wait()

        def check(place: int, sample: int, token_ids: list[int]) -> None:
            if self._is_closed.is_set():
                raise CancelledError

        self._running = self._thread.submit(
            self._engine.generate, problems, on_tokens=check, on_rollout=on_rollout, **how
        )
        return self._running

    def close(self) -> None:
        """Give up what runs; it ends with its next tokens."""
        self._is_closed.set()
        self._thread.shutdown()

    def _wait(self) -> None:
        """Its error, if there is one, is for whoever asks for the result."""
        if self._running is not None:
            wait([self._running])
