"""Transformers' progress bars: shown for files that take a while, on a terminal, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SLOW_BYTES = 2 << 30


@contextmanager
def bars_for(num_bytes: int) -> Iterator[None]:
    """Inside it transformers draws bars only if `num_bytes` of weights are worth one."""
    from transformers.utils import logging

    switches: dict[bool, Callable[[], None]] = {
        True: logging.enable_progress_bar,
        False: logging.disable_progress_bar,
    }
    was_on = logging.is_progress_bar_enabled()
    switches[num_bytes >= SLOW_BYTES and sys.stderr.isatty()]()
    try:
        yield
    finally:
        switches[was_on]()
