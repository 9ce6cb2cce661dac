"""The data of a run as its recipe asks for it: rendered once, in the order of the seed, this rank's share.

sources --open_dataset--> examples --render--> rows, pairs, labels or problems --Mixture--> Loader, Prompts
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from kitae.config import GroupRolloutSettings
from kitae.data.chat import Template
from kitae.data.formats import Purpose
from kitae.data.loader import Loader
from kitae.data.mixing import Mixture, hold_out
from kitae.data.pairs import RenderedPairs, WithMismatched
from kitae.data.problems import RenderedProblems
from kitae.data.rendered import RenderedRows
from kitae.data.sources import Dataset, open_dataset
from kitae.parallel.world import World
from kitae.recipes._prompts import Prompts
from kitae.rewards import reasoning
from kitae.train.difficulty import Difficulty
from kitae.train.progress import Ticker
from kitae.train.run import Run
from kitae.types import Problem, Row

SPLIT_SEED = 0
"""Held-out rows do not change with train.seed, so that runs with other seeds are judged on the same rows."""


class RunData:
    """Training and evaluation data on this rank; `cfg` is the recipe's own Settings."""

    def __init__(self, cfg: Any, *, world: World, run: Run, template: Template) -> None:
        # cfg is Any: each recipe has its own Settings class, and shares the sections used here.
        self.cfg, self.world, self.run, self.template = cfg, world, run, template
        self.difficulty: Difficulty | None = None
        """How hard each problem is, where `prompts` deals them."""
        self._mixture: Mixture[Any] | None = None

    def rendered_rows(self, *, max_length: int) -> tuple[Sequence[list[Row]], Sequence[list[Row]] | None]:
        """Training and evaluation rows (None where none were asked for), rendered once and kept on disk."""

        def render(dataset: Sequence[Any], use: str = "training") -> Sequence[list[Row]]:
            return RenderedRows(
                dataset,
                use=use,
                template=self.template,
                max_length=max_length,
                skip_bad=self._skips_bad_rows,
                on_progress=Ticker("rows rendered", total=len(dataset)),
            )

        sources, held_out = self._sources(purpose="sft")
        return self._mixed([render(s) for s in sources]), held_out and render(held_out, "evaluation")

    def problems(
        self, *, max_prompt_length: int, purpose: Purpose = "rl"
    ) -> tuple[Sequence[Problem], Sequence[Problem] | None]:
        """The same as questions to sample from; too long ones are dropped and counted."""

        def render(dataset: Sequence[Any], first_index: int = 0) -> Sequence[Problem]:
            return RenderedProblems(
                dataset,
                template=self.template,
                max_prompt_length=max_prompt_length,
                skip_bad=self._skips_bad_rows,
                first_index=first_index,
                on_progress=Ticker("prompts rendered", total=len(dataset)),
            )

        sources, held_out = self._sources(purpose=purpose)
        starts = accumulate(map(len, sources), initial=0)
        rendered = [render(source, start) for source, start in zip(sources, starts, strict=False)]
        return self._mixed(rendered), held_out and render(held_out)

    def pairs(
        self, *, max_length: int, max_prompt_length: int | None = None, margin_column: str = ""
    ) -> tuple[Sequence[list[Row]], Sequence[list[Row]] | None]:
        """Training and evaluation pairs, `[chosen, rejected]` each; evaluation is None where none was asked for."""

        def render(dataset: Sequence[Any], use: str = "training") -> RenderedPairs:
            return self._rendered_pairs(
                dataset, max_length, max_prompt_length, use=use, margin_column=margin_column
            )

        sources, held_out = self._sources(purpose="pairs")
        return self._mixed([render(s) for s in sources]), held_out and render(held_out, "evaluation")

    def labelled(
        self, *, max_length: int, max_prompt_length: int | None = None
    ) -> tuple[Sequence[list[Row]], Sequence[list[Row]] | None]:
        """The same as labelled completions, each followed by its prompt with another prompt's completion."""

        def render(dataset: Sequence[Any], use: str = "training") -> WithMismatched:
            items = self._rendered_pairs(dataset, max_length, max_prompt_length, use=use, as_labels=True)
            return WithMismatched(items, max_length=max_length)

        sources, held_out = self._sources(purpose="labels")
        return self._mixed([render(s) for s in sources]), held_out and render(held_out, "evaluation")

    def _rendered_pairs(
        self, dataset: Sequence[Any], max_length: int, max_prompt_length: int | None, **how: Any
    ) -> RenderedPairs:
        # **how: the other keyword arguments of RenderedPairs.
        return RenderedPairs(
            dataset,
            template=self.template,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            skip_bad=self._skips_bad_rows,
            on_progress=Ticker("pairs rendered", total=len(dataset)),
            **how,
        )

    def loader(self, items: Sequence[Any], *, items_per_step: int, name: str = "loader") -> Loader[Any]:
        """Walks through items in the order of the seed, this rank's share of each step; part of every checkpoint."""
        loader = Loader(
            items,
            items_per_step=items_per_step,
            seed=self.cfg.train.seed,
            shuffle=self.cfg.data.shuffle,
            rank=self.world.rank,
            world_size=self.world.world_size,
            order=self._mixture.order if self._mixture else None,
        )
        self.run.track(name, loader)
        return loader

    def prompts(self, problems: Sequence[Problem], *, rollout: GroupRolloutSettings) -> Prompts:
        """The prompts of each round; from here on report_round counts how hard each problem is (difficulty.jsonl)."""
        loader = self.loader(problems, items_per_step=rollout.prompts_per_round)
        is_reasoning = self.cfg.reward.function == "reasoning"
        self.difficulty = Difficulty(right_from=reasoning.RIGHT_ANSWER if is_reasoning else 1.0)
        self.run.track("difficulty", self.difficulty)
        mixture = self._mixture
        spares = Loader(
            range(len(problems)),
            items_per_step=1,
            seed=self.cfg.train.seed + 1,
            # An order that no epoch of the loader has.
            order=None if mixture is None else lambda epoch: mixture.order(epoch + 1_000_003),
        )
        self.run.track("spares", spares)
        return Prompts(
            problems,
            loader=loader,
            spares=spares,
            world=self.world,
            curriculum=self.difficulty if rollout.curriculum == "pass_rate" else None,
            refill_passes=rollout.refill,
        )

    def _sources(self, *, purpose: Purpose) -> tuple[list[Sequence[Any]], Sequence[Any] | None]:
        """Training sources (one, or one per weight), and evaluation rows if any are asked for."""
        data = self.cfg.data
        reward = getattr(self.cfg, "reward", None)  # distillation samples and judges nothing
        judges = {reward.function, *reward.extra} if reward is not None else set()
        need_answer = purpose == "rl" and not judges.isdisjoint({"reasoning", "math"})

        def read(paths: Sequence[str], *, split: str, max_rows: int | None) -> Dataset:
            return open_dataset(
                paths,
                data=data,
                purpose=purpose,
                need_answer=need_answer,
                split=split,
                max_rows=max_rows,
                on_progress=Ticker("rows read"),
            )

        groups = [[path] for path in data.train] if data.weights else [data.train]
        sources: list[Any] = [read(paths, split=data.split, max_rows=data.max_rows) for paths in groups]
        self.run.identify(data="+".join(source.fingerprint for source in sources))
        held_out: Sequence[Any] | None = None
        if data.eval or data.eval_split:
            split = data.eval_split or data.split
            held_out = read(data.eval or data.train, split=split, max_rows=self.cfg.eval.max_rows)
        elif self.cfg.eval.steps and data.hold_out:
            most = max(1, self.cfg.eval.max_rows // len(sources))
            parts = [hold_out(s, share=data.hold_out, seed=SPLIT_SEED, max_rows=most) for s in sources]
            sources = [kept for kept, _ in parts]
            held_out = [example for _, held in parts for example in held]
        return sources, held_out

    def _mixed(self, sources: list[Sequence[Any]]) -> Sequence[Any]:
        if len(sources) == 1:
            return sources[0]
        self._mixture = Mixture(sources, weights=self.cfg.data.weights, seed=self.cfg.train.seed)
        return self._mixture

    @property
    def _skips_bad_rows(self) -> bool:
        return bool(self.cfg.data.on_bad_row == "skip")
