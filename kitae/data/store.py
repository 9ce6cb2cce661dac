"""Records on disk, their offsets in memory: how data sets larger than memory are read in any order."""

from __future__ import annotations

import os
import tempfile
from array import array

from kitae.errors import PlanError


class RecordStore:
    """Append-only bytes in a temporary file that has no name: nothing to clean up, nobody else can change it.

    Append everything first, then read by index; reading is safe from several threads and after a fork.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="kitae-data-")  # noqa: SIM115 - lives as long as the store
        self._ends = array("Q")

    def append(self, record: bytes) -> None:
        """Add one record at the end."""
        try:
            self._file.write(record)
        except OSError as error:
            raise self._full(error) from error
        self._ends.append((self._ends[-1] if self._ends else 0) + len(record))

    def finish(self) -> None:
        """Make everything appended readable."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._full(error) from error

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self._ends):
            raise IndexError(f"record {index} of {len(self._ends)}")
        start = self._ends[index - 1] if index else 0
        return os.pread(self._file.fileno(), self._ends[index] - start, start)

    def _full(self, error: OSError) -> PlanError:
        return PlanError(
            f"cannot keep the prepared rows in {tempfile.gettempdir()}: {error.strerror}; free space there "
            "or point TMPDIR to a larger disk"
        )
