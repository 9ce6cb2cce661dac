"""Signals that ask a run to stop: the first lets the step end and be saved, the second leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from kitae.errors import KitaeError, StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """Remembers a stop signal for as long as work is deferred to the end of the step.

    While `is_deferring` is False (models load, data is read) there is nothing to save, and the first signal raises
    StoppedError where it strikes. A signal that was ignored when the process started (nohup) stays ignored. Outside
    the main thread Python allows no handlers, and nothing is installed.
    """

    def __init__(self, *, says: bool, at_once: Callable[[int], None]) -> None:
        """`says`: print what a signal does (rank 0). `at_once(exit code)` is called before a second one leaves."""
        self.received: int | None = None
        self.is_deferring = False
        self._says = says
        self._at_once = at_once
        self._previous: dict[signal.Signals, object] = {}

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            self._tell(f"{name} again: leaving at once; the last checkpoint is whole\n")
            self._at_once(128 + number)
            os._exit(128 + number)
        self.received = number
        if not self.is_deferring:
            raise StoppedError(f"stopped by {name} before the first step", signal_number=number)
        self._tell(f"{name}: finishing this step, then saving (once more to leave at once)\n")

    def _tell(self, text: str) -> None:
        """Straight to the terminal: a handler may strike inside print or logging, which are not reentrant.

        The terminal may be gone (that is what SIGHUP says); the run is saved all the same.
        """
        if self._says:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}".encode())


def exit_code(error: BaseException | None) -> int:
    """The process exit code an error stands for; None is success."""
    if error is None:
        return 0
    if isinstance(error, KitaeError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1
