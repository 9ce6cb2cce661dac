"""The answers that rejection sampling has asked for, judged, and keeps on the disk: asked.jsonl."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from kitae.errors import DataError, LockedError
from kitae.train.files import JsonLines, disk_errors

Place = tuple[int, int]
"""A problem's index and the answer's number among those to it, from 0."""


class Answer(TypedDict):
    """One answer with its judgement: a line of asked.jsonl."""

    problem: int
    """The problem's index in its data."""
    sample: int
    prompt: str
    completion: str
    answer: str | None
    """The gold answer."""
    reward: float | None
    reason: str
    label: bool | None
    """Whether it earned a right answer's reward; with it the file is KTO's data, and SFT refuses it."""
    num_tokens: int
    finish_reason: str
    time: float
    """When it was judged, in seconds since 1970."""


class Asked:
    """The file of all answers so far, held by one process; a torn last line is cut off when it is opened."""

    def __init__(self, path: Path, *, anew: bool = False) -> None:
        """`anew` forgets what is there."""
        self.path = path
        with disk_errors(path):
            self._held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._held)
            raise LockedError(
                f"{path} is being written by another process; wait for it or stop it"
            ) from error
        try:
            self._lines = JsonLines(path)
            if anew:
                self._lines.cut(0)
            self.places: set[Place] = {(a["problem"], a["sample"]) for _, a in read_asked(path)}
        except BaseException:
            os.close(self._held)
            raise

    def append(self, answers: Sequence[Answer]) -> list[Answer]:
        """Write the answers that are new, and return them.

        A local model answers whole groups: after a kill between two lines of one, it repeats what is there already.
        """
        new = [answer for answer in answers if (answer["problem"], answer["sample"]) not in self.places]
        self._lines.append(*new)
        self.places |= {(answer["problem"], answer["sample"]) for answer in new}
        return new

    def close(self) -> None:
        """Wait until the disk has everything, and let others have the file."""
        self._lines.sync()
        self._lines.close()
        os.close(self._held)


def read_asked(path: Path) -> Iterator[tuple[int, Answer]]:
    """(where its line begins, answer) for every line."""
    start = 0
    with disk_errors(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                answer: Answer = json.loads(line)
                missing = Answer.__required_keys__ - answer.keys()
            except (ValueError, AttributeError):
                missing = frozenset(["an object"])
            if missing:
                raise DataError(
                    f"{path}:{number} is damaged (it lacks {', '.join(sorted(missing))}); remove that line, and its "
                    "problem is asked again"
                )
            yield start, answer
            start += len(line)
