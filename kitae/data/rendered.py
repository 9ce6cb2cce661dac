"""Every example of a data set as training rows or as problems, rendered once and kept on disk."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from kitae.data.chat import Template
from kitae.data.formats import Example
from kitae.data.sources import OnProgress, Problems
from kitae.data.store import RecordStore
from kitae.errors import DataError
from kitae.types import Problem, Row

Item = TypeVar("Item", covariant=True)


class _Rendered(Sequence[Item], Generic[Item]):
    """Renders all examples at the start; examples that the template refuses are listed together, or left out."""

    def __init__(
        self,
        dataset: Sequence[Example],
        template: Template,
        *,
        max_length: int,
        skip_bad: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.num_examples = len(dataset)
        self.max_length = max_length
        self.counts: Counter[str] = Counter()
        """What became of the examples, by name; see report()."""
        self._store = RecordStore()
        problems = Problems()
        for i in range(len(dataset)):
            if on_progress is not None and i % 100 == 0:
                on_progress(i)
            try:
                packed = self._render(dataset[i], template, index=i)
            except DataError as error:
                problems.add(error)
                continue
            if packed is not None:
                self._store.append(json.dumps(packed, ensure_ascii=False, separators=(",", ":")).encode())
        self._store.finish()
        if on_progress is not None:
            on_progress(len(dataset))
        problems.settle(skip=skip_bad, num_rows=len(dataset))
        if len(dataset) and not len(self._store):
            raise DataError(self._nothing_left())

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._unpack(json.loads(self._store[index if index >= 0 else len(self) + index]))

    @abstractmethod
    def report(self) -> str:
        """One or a few lines for the log."""

    @abstractmethod
    def _render(self, example: Example, template: Template, *, index: int) -> Any:
        """What to keep of an example, as JSON values; None where nothing is left of it."""

    @abstractmethod
    def _unpack(self, packed: Any) -> Item:
        """The item again."""

    @abstractmethod
    def _nothing_left(self) -> str:
        """The error where no example is left."""


class RenderedRows(_Rendered[list[Row]]):
    """Item i is the list of rows of one example: several where the template rewrites earlier turns.

    Examples that have no target left within max_length tokens are left out and counted.
    """

    def report(self) -> str:
        n = self.counts
        lines = [
            f"{n['rows']} rows from {len(self)} examples, {n['tokens']} tokens, "
            f"{100 * n['taught_tokens'] / max(n['tokens'], 1):.1f} % of them taught"
        ]
        if n["rows_cut"]:
            lines.append(
                f"{n['rows_cut']} rows were longer than data.max_length = {self.max_length} and lost their end, "
                f"{n['answers_cut']} of them an answer; {n['rows_dropped']} had no target left and were dropped"
            )
        if n["control_literals"]:
            lines.append(f"{n['control_literals']} control tokens written in the data's text stay text")
        return "\n".join(lines)

    def _render(self, example: Example, template: Template, *, index: int) -> Any:
        rows = template.rows(example, max_length=self.max_length, counts=self.counts)
        self.counts["rows"] += len(rows)
        self.counts["tokens"] += sum(len(row.token_ids) for row in rows)
        self.counts["taught_tokens"] += sum(row.num_taught for row in rows)
        return [(row.token_ids, row.prompt_length, _spans(row.loss_mask)) for row in rows] or None

    def _unpack(self, packed: Any) -> list[Row]:
        return [_row(*row) for row in packed]

    def _nothing_left(self) -> str:
        return (
            f"none of {self.num_examples} rows has anything left to teach within "
            f"data.max_length = {self.max_length} tokens; raise it"
        )


class RenderedProblems(_Rendered[Problem]):
    """Item i is a question ready for sampling; those longer than max_length tokens are left out and counted."""

    def report(self) -> str:
        dropped = self.num_examples - len(self)
        line = f"{len(self)} prompts, the longest of {self.counts['longest']} tokens"
        return line + (f"; {dropped} longer than {self.max_length} tokens were dropped" if dropped else "")

    def _render(self, example: Example, template: Template, *, index: int) -> Any:
        problem = template.problem(example, index=index, max_length=self.max_length)
        if problem is None:
            return None
        self.counts["longest"] = max(self.counts["longest"], len(problem.token_ids))
        return {name: getattr(problem, name) for name in Problem.__slots__}

    def _unpack(self, packed: Any) -> Problem:
        return Problem(**packed)

    def _nothing_left(self) -> str:
        return (
            f"all {self.num_examples} prompts are longer than {self.max_length} tokens; "
            "raise rollout.max_prompt_length"
        )


def _spans(mask: list[bool]) -> list[tuple[int, int]]:
    """Start and end of each run of True."""
    edges = [i for i in range(len(mask) + 1) if (i < len(mask) and mask[i]) != (i > 0 and mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _row(token_ids: list[int], prompt_length: int, spans: list[tuple[int, int]]) -> Row:
    mask = [False] * len(token_ids)
    for start, end in spans:
        mask[start:end] = [True] * (end - start)
    return Row(token_ids=token_ids, loss_mask=mask, prompt_length=prompt_length)
