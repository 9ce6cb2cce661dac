"""Files, globs, folders, hub names and remote addresses to strictly checked rows with random access.

    paths --expand--> files --read_records--> records --to_example--> Example --RecordStore--> Dataset[i]

One pass at the start checks every row and writes it to a private file of our own. So training reads one simple form
whatever the source was, needs memory for one offset a row, and does not notice when a source changes afterwards.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import xxhash

from kitae.config import DataSettings
from kitae.data.files import expand
from kitae.data.formats import Example, Purpose, RowError, to_example
from kitae.data.preferences import to_preference
from kitae.data.readers import read_records
from kitae.data.store import RecordStore
from kitae.errors import DataError

log = logging.getLogger(__name__)

MAX_LISTED = 100

OnProgress = Callable[[int], None]
"""Called with the number of rows read so far, now and then."""


class BadRows:
    """Bad rows: the first hundred as text, and how many there were."""

    def __init__(self) -> None:
        self.listed: list[str] = []
        self.total = 0

    def add(self, problem: object) -> None:
        """Note one bad row: its file and line, and the reason."""
        self.total += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(str(problem))

    def settle(self, *, skip: bool, num_rows: int) -> None:
        """Refuse if there were any, or say how many were left out."""
        if not self.total:
            return
        shown = "\n  ".join(self.listed)
        more = f"\n  ... and {self.total - len(self.listed)} more" if self.total > len(self.listed) else ""
        if not skip:
            raise DataError(
                f"{self.total} of {num_rows} rows cannot be used (data.on_bad_row = skip leaves them out):"
                f"\n  {shown}{more}"
            )
        log.warning("left out %d of %d rows that cannot be used:\n  %s%s", self.total, num_rows, shown, more)


class Dataset(Sequence[Example]):
    """Checked rows on disk. `fingerprint` is the hash of their content, wherever it came from."""

    def __init__(self, store: RecordStore, *, fingerprint: str, hashes: array[int], num_skipped: int) -> None:
        self._store = store
        self.fingerprint = fingerprint
        self.hashes = hashes
        """64-bit hash of each row's content, to find rows that are equal."""
        self.num_skipped = num_skipped

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        content, source = json.loads(self._store[index if index >= 0 else len(self) + index])
        messages, answer, columns, *preference = content
        rejected, label = preference or (None, None)
        return Example(
            messages=messages, answer=answer, columns=columns, rejected=rejected, label=label, source=source
        )


def open_dataset(
    paths: Sequence[str] | str,
    *,
    data: DataSettings,
    purpose: Purpose = "sft",
    need_answer: bool = False,
    split: str | None = None,
    max_rows: int | None = None,
    on_progress: OnProgress | None = None,
) -> Dataset:
    """Read and check all rows; bad ones are all found before the error that lists them.

    `split` is only for hub names (default: data.split). `max_rows` stops after that many good rows.
    """
    files = expand([paths] if isinstance(paths, str) else paths, split=split or data.split)
    store, bad = RecordStore(), BadRows()
    whole, hashes, num_read = xxhash.xxh3_128(), array("Q"), 0
    for record, where in chain.from_iterable(read_records(file.path, name=file.name) for file in files):
        if max_rows is not None and len(store) == max_rows:
            break
        num_read += 1
        if on_progress is not None and num_read % 1000 == 0:
            on_progress(num_read)
        try:
            if isinstance(record, RowError):
                raise record
            if purpose in ("pairs", "labels"):
                example = to_preference(record, data=data, purpose=purpose, source=where)
                preference = [example.rejected, example.label]
            else:
                example = to_example(
                    record, data=data, purpose=purpose, need_answer=need_answer, source=where
                )
                preference = []
            content = _as_json([example.messages, example.answer, example.columns, *preference])
        except RowError as error:
            bad.add(f"{where}: {error}")
            continue
        whole.update(len(content).to_bytes(8, "little"))
        whole.update(content)
        hashes.append(xxhash.xxh3_64_intdigest(content))
        store.append(b"[" + content + b"," + json.dumps(where).encode() + b"]")
    store.finish()
    if on_progress is not None:
        on_progress(num_read)
    bad.settle(skip=data.on_bad_row == "skip", num_rows=num_read)
    if not len(store):
        names = ", ".join(file.name for file in files)
        raise DataError(f"no rows in {names}")
    return Dataset(store, fingerprint=whole.hexdigest(), hashes=hashes, num_skipped=bad.total)


def first_questions(paths: Sequence[str], *, data: DataSettings, count: int) -> list[str]:
    """The first questions that can be read, for a look at their language; bad rows are open_dataset's business."""
    questions: list[str] = []
    for file in expand(list(paths), split=data.split):
        for record, _ in read_records(file.path, name=file.name):
            if len(questions) == count:
                return questions
            try:
                example = to_example(record, data=data, purpose="rl")
            except RowError:
                continue
            questions.append(example.question[-1]["content"])
    return questions


def _as_json(value: Any) -> bytes:
    """Compact UTF-8 JSON of a row; RowError where its text is no valid text."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        if "\\u0000" in text and any("\0" in part for part in _texts(value)):
            raise RowError("NUL character in text")
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("half a surrogate pair in text, which is no valid Unicode") from error
    except RecursionError as error:
        raise RowError("nested too deep") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError(f"a value that JSON cannot hold: {error}") from error


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from (key, *_texts(part))
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
