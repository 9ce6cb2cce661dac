"""resources.jsonl: processor share, memory of this process and free memory, every few seconds, read from /proc."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from kitae.errors import RunDirError
from kitae.train.files import JsonLines

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0


class ResourceMonitor:
    """A thread that writes one line now, every few seconds, and when it is closed."""

    def __init__(self, path: Path, *, interval_s: float = INTERVAL_S) -> None:
        self._lines = JsonLines(path)
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._clock, self._used = time.monotonic(), _cpu_seconds()
        self._thread = threading.Thread(target=self._watch, name="kitae-resources", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._lines.close()

    def _watch(self) -> None:
        try:
            while not self._ended.is_set():
                self._lines.append(self._sample())
                self._ended.wait(self._interval_s)
            self._lines.append(self._sample())
        except RunDirError as error:
            logger.warning("resources.jsonl is no longer written: %s", error)

    def _sample(self) -> dict[str, float | None]:
        clock, used = time.monotonic(), _cpu_seconds()
        share = (used - self._used) / (clock - self._clock) if clock > self._clock else 0.0
        self._clock, self._used = clock, used
        return {
            "time": round(time.time(), 3),
            "cpu_percent": round(100 * share, 1),
            "rss_mib": _mebibytes(Path("/proc/self/status"), "VmRSS:"),
            "free_mib": _mebibytes(Path("/proc/meminfo"), "MemAvailable:"),
        }


def _cpu_seconds() -> float:
    """Processor time of this process and of the children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _mebibytes(path: Path, key: str) -> float | None:
    """A "Key:  123 kB" line of a /proc file in MiB; None on systems without it."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith(key)), None)
    return None if found is None else round(int(found) / 1024, 1)
