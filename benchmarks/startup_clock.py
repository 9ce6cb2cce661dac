"""When this process began, for startup.py's children, which are run by interpreters with different packages."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_began() -> float:
    """In seconds as time.time() counts them, to a hundredth. Linux only."""
    after_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    seconds: float = after_boot / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - seconds)
