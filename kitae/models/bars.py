"""Transformers' progress bars: shown for files that take a while, on a terminal, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SLOW_BYTES = 2 << 30


@contextmanager
def bars_for(num_bytes: int) -> Iterator[None]:
    """Inside it transformers draws bars only if `num_bytes` of weights are worth one."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    is_worth_it = num_bytes >= SLOW_BYTES and sys.stderr.isatty()
    (logging.enable_progress_bar if is_worth_it else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if was_on else logging.disable_progress_bar)()
