"""The questions of a data set, rendered for sampling."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from typing import Any

from kitae.data.chat import Template
from kitae.data.formats import Example
from kitae.data.sources import BadRows, OnProgress
from kitae.errors import DataError
from kitae.types import Problem

log = logging.getLogger(__name__)


class RenderedProblems(Sequence[Problem]):
    """Item i is the i-th example whose prompt fits; longer ones are dropped and counted in num_dropped.

    Only numbers are kept in memory: an example is rendered again each time it is taken. Examples that the template
    refuses are listed together in a DataError, or left out too with skip_bad. `first_index` is the first example's
    Problem.index: several sources of one run do not share numbers.
    """

    def __init__(
        self,
        dataset: Sequence[Example],
        *,
        template: Template,
        max_prompt_length: int,
        skip_bad: bool = False,
        first_index: int = 0,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._dataset, self._template, self._first_index = dataset, template, first_index
        self._fitting = array("Q")
        refused = BadRows()
        for i in range(len(dataset)):
            if on_progress is not None and i % 100 == 0:
                on_progress(i)
            try:
                if template.problem(dataset[i], index=i, max_length=max_prompt_length) is not None:
                    self._fitting.append(i)
            except DataError as error:
                refused.add(error)
        if on_progress is not None:
            on_progress(len(dataset))
        refused.settle(skip=skip_bad, num_rows=len(dataset))
        self.num_dropped = len(dataset) - len(self._fitting) - refused.total
        if not self._fitting:
            raise DataError(
                f"all {len(dataset)} prompts are longer than rollout.max_prompt_length = {max_prompt_length} tokens"
            )
        if self.num_dropped:
            log.warning(
                "%d of %d prompts are longer than rollout.max_prompt_length = %d tokens and were dropped",
                self.num_dropped, len(dataset), max_prompt_length,
            )  # fmt: skip

    @property
    def indices(self) -> list[int]:
        """Problem.index of each item, without rendering it."""
        return [self._first_index + number for number in self._fitting]

    def __len__(self) -> int:
        return len(self._fitting)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = self._fitting[index]
        return self._template.problem(
            self._dataset[number], index=self._first_index + number, max_length=None
        )
