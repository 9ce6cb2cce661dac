"""What every recipe needs around its loop: data, model, learner, sampler, judge, evaluators, and reports.

A recipe asks for these in the order of its pipeline, so data errors come before any weights are read.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kitae.config import RewardSettings, RolloutSettings, SamplingSettings
from kitae.data.chat import Template
from kitae.data.collate import collate, with_stream
from kitae.data.loader import Loader
from kitae.data.mixing import Mixture, hold_out
from kitae.data.rendered import RenderedProblems, RenderedRows
from kitae.data.sources import Dataset, open_dataset
from kitae.evaluate.perplexity import evaluate_loss
from kitae.models.load import load_policy
from kitae.models.policy import Policy
from kitae.parallel import fsdp
from kitae.parallel.world import World
from kitae.rewards.pool import RewardPool
from kitae.rollout.generic import GenericEngine
from kitae.train.learner import Learner
from kitae.train.run import Run
from kitae.types import Batch, Problem, Rollout, Row, Score

log = logging.getLogger(__name__)
Evaluate = Callable[[], dict[str, float]]
EVAL_SEED = 0
MAX_HOLD_OUT = 500


class Setup:
    """The parts of one run on this rank. Made by kitae/recipes/_run.py; `cfg` is the recipe's Settings."""

    def __init__(self, cfg: Any, *, world: World, run: Run, tokenizer: Any, template: Template) -> None:
        # cfg and tokenizer: a recipe's own Settings class, and transformers' tokenizer, which is untyped.
        self.cfg, self.world, self.run = cfg, world, run
        self.tokenizer, self.template = tokenizer, template
        self.policy: Policy | None = None
        self._closers: list[Callable[[], None]] = []
        self._step_started = time.perf_counter()

    def close(self) -> None:
        """End worker processes."""
        for closer in reversed(self._closers):
            closer()

    # ---------------------------------------------------------------------------------------------- data
    def rendered_rows(self, *, max_length: int) -> tuple[RenderedRows, RenderedRows | None]:
        """Training rows and evaluation rows (None where none were asked for), rendered once and kept on disk."""
        train, held_out = self._datasets(purpose="sft")
        rows = RenderedRows(train, self.template, max_length=max_length)
        self.log_once(rows.report())
        return rows, held_out and RenderedRows(held_out, self.template, max_length=max_length)
