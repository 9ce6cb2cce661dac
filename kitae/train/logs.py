"""train.log: one line per event, secrets masked, control characters written out; tracebacks go here only.

A log that has become large is renamed to train.log.1, that one to train.log.2, and the oldest is removed.
"""

from __future__ import annotations

import logging
import logging.handlers
import re
from pathlib import Path

from rich.console import Console

from kitae.train.files import disk_errors
from kitae.train.progress import ConsoleHandler

MAX_LOG_BYTES, LOGS_KEPT = 50 * 2**20, 3
LOG_FILES = ("train.log", *(f"train.log.{number}" for number in range(1, LOGS_KEPT + 1)))
FILE_ONLY = {"is_file_only": True}
"""As a log call's `extra`: for train.log, not for the terminal (progress lines, tracebacks)."""
SECRET = re.compile(r"\bhf_\w{8,}|\bsk-[\w-]{8,}|(?<=Bearer )[\w.~+/=-]{8,}|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Clean(logging.Formatter):
    """Masks tokens and passwords, escapes control characters, and indents further lines: none forges a record."""

    def format(self, record: logging.LogRecord) -> str:
        text = SECRET.sub("***", super().format(record))
        return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.replace("\n", "\n    ")
        return super().formatMessage(record)


class LogFile(logging.handlers.RotatingFileHandler):
    """train.log; a line that the disk refuses is said once on the terminal and costs the run nothing."""

    is_broken = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.is_broken:
            self.is_broken = True
            logging.getLogger(__name__).warning("%s cannot be written any more", self.baseFilename)


class RunLog:
    """Sends kitae's log lines to train.log and to the terminal, from open to close; silent on ranks above 0."""

    def __init__(self, folder: Path | None, *, level: str, console: Console) -> None:
        self._logger = logging.getLogger("kitae")
        self._before = (self._logger.level, self._logger.propagate)
        self._handlers: list[logging.Handler] = []
        if folder is None:
            self._logger.setLevel(logging.ERROR)
            return
        with disk_errors(folder / "train.log"):
            file = LogFile(
                folder / LOG_FILES[0],
                maxBytes=MAX_LOG_BYTES,
                backupCount=LOGS_KEPT,
                encoding="utf-8",
                errors="backslashreplace",
            )
        file.setFormatter(Clean("%(asctime)s %(levelname)s %(message)s"))
        self._handlers.append(file)
        if not self._logger.handlers:  # nobody prints kitae's lines yet
            terminal = ConsoleHandler(console)
            terminal.setFormatter(Clean("%(message)s"))
            terminal.addFilter(lambda record: not getattr(record, "is_file_only", False))
            self._handlers.append(terminal)
        for handler in self._handlers:
            self._logger.addHandler(handler)
        self._logger.setLevel(level.upper())

    def close(self) -> None:
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()
        self._logger.setLevel(self._before[0])
        self._logger.propagate = self._before[1]
