"""Score a model on problems with gold answers, or its perplexity: kitae evaluate MODEL --dataset_name D."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kitae.cli import _help
from kitae.cli._open import Opened, UseSettings, open_model, warn_on_stderr
from kitae.cli._output import write_json
from kitae.config import DataSettings, RewardSettings, require
from kitae.errors import RunDirError
from kitae.settings import read

if TYPE_CHECKING:
    from kitae.data.sources import Dataset
    from kitae.evaluate.records import Record
    from kitae.types import Problem

PROBLEMS_AT_ONCE = 64
_GENERATING = ("n", "results", "reward", "form", "strict_form", "raw")
"""Settings that mean nothing where nothing is generated."""
SHOWN = ("accuracy", "format_rate", "mean_reward", "mean_length", "truncated", "loss", "perplexity")


class Settings(UseSettings):
    """Score a model on problems with gold answers, or measure its perplexity."""

    temperature: float = Field(0.0, ge=0, le=10)
    """Logits are divided by it; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of tokens whose probability reaches this."""
    dataset_name: list[str]
    """Files, globs, folders or hub names of the rows."""
    split: str = "test"
    """Split of a hub data set."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column mapping, ours = yours, such as prompt = "frage"; see the data page for our names."""
    num_samples: int | None = Field(None, ge=1)
    """Use only the first rows."""
    n: int = Field(1, ge=1)
    """Completions per problem; above 1 reports pass@k, and needs a temperature above 0."""
    by: str | None = None
    """A data column: report each of its values by itself, and the gap between them."""
    baseline: str | None = None
    """Another model, evaluated the same way and compared problem by problem."""
    perplexity: bool = False
    """Measure the loss on the rows' own completions instead of generating."""
    max_length: int = Field(2048, ge=2)
    """Longest row in tokens for perplexity."""
    reward: str = "reasoning"
    """The reward reported beside accuracy: a built-in name, or file.py:function."""
    form: Literal["answer_tags", "boxed"] = "answer_tags"
    """Form of the reasoning reward."""
    strict_form: bool = True
    """Nothing but white space around and between the blocks; false allows other text there."""
    results: str | None = None
    """File for one JSON line per completion; default: evaluations/MODEL-DATA-TIME.jsonl."""
    json_file: str | None = None
    """Also write the summary to this file as JSON (--json FILE)."""


def main(argv: list[str]) -> int:
    """Evaluate, print a summary, and say where the details are."""
    if _help.is_asked(argv):
        _help.show(Settings, prog="kitae evaluate MODEL --dataset_name DATA")
        return 0
    use, notes = read("evaluate", Settings, argv, positional=("model",))
    warn_on_stderr(notes.warnings)
    summary = evaluate(use, say=print)
    if use.json_file:
        write_json(use.json_file, summary)
    return 0


def from_python(given: dict[str, Any]) -> dict[str, Any]:
    """What kitae.evaluate returns: the summary."""
    use, notes = read("evaluate", Settings, given)
    warn_on_stderr(notes.warnings)
    return evaluate(use, say=lambda _line: None)


def evaluate(use: Settings, *, say: Callable[[str], None]) -> dict[str, Any]:
    """The summary of one model, with its baseline's and their comparison where one is named.

    Rows and results files are seen to before any weights are read.
    """
    from kitae.evaluate.groups import require_column

    require_sense(use)
    dataset = _open_rows(use)
    if use.by is not None:
        require_column(use.by, (example.columns for example in dataset))
    if use.perplexity:
        return _perplexity(use, dataset, say=say)
    results = _results_path(use, use.model)
    if use.baseline is None:
        return _accuracy(use, use.model, dataset, results=results, say=say)[0]
    from kitae.cli.compare import text_of
    from kitae.evaluate.compare import compare

    results_before = results.with_name(f"{results.stem}-baseline{results.suffix}")
    _require_new(results_before)
    baseline, before = _accuracy(use, use.baseline, dataset, results=results_before, say=say)
    summary, records = _accuracy(use, use.model, dataset, results=results, say=say)
    comparison = compare(before, records)
    say(text_of(comparison, first=use.baseline, second=use.model))
    return {**summary, "baseline": baseline, "comparison": asdict(comparison)}


def require_sense(use: Settings) -> None:
    """Refuse settings that contradict each other or would have no effect."""
    require(
        use.n == 1 or use.temperature > 0,
        f"n is {use.n} and temperature 0, which gives the same completion {use.n} times; set --temperature, such as 0.6",
    )
    require(
        not (use.perplexity and use.baseline is not None),
        "perplexity and baseline are both given; only accuracies are compared, so run --perplexity for each model",
    )
    for name in _GENERATING if use.perplexity else ():
        field = Settings.model_fields[name]
        require(
            getattr(use, name) == field.get_default(call_default_factory=True),
            f"{name} would have no effect: --perplexity generates nothing; leave one of them out",
        )


def _open_rows(use: Settings) -> Dataset:
    from kitae.data.sources import open_dataset

    return open_dataset(
        use.dataset_name,
        data=DataSettings(columns=use.columns),
        purpose="sft" if use.perplexity else "rl",
        need_answer=not use.perplexity,
        split=use.split,
        max_rows=use.num_samples,
    )


def _accuracy(
    use: Settings, name: str, dataset: Dataset, *, results: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Record]]:
    """Generate and judge with one model; its results file is written when all is done."""
    from kitae.evaluate import accuracy
    from kitae.evaluate.records import write_records
    from kitae.rewards.pool import RewardPool

    reward = RewardSettings(function=use.reward, form=use.form, strict_form=use.strict_form, on_error="mask")
    opened = open_model(use, name=name)
    problems = _problems(use, opened, dataset)
    records: list[Record] = []
    running = _Running(name, total=len(problems))
    with RewardPool(reward) as pool:
        answered = accuracy.answer(
            opened.engine,
            problems,
            pool=pool,
            sampling=use.sampling(),
            n=use.n,
            seed=use.seed,
            problems_at_once=PROBLEMS_AT_ONCE,
            on_tokens=running.on_tokens,
        )
        for chunk in answered:
            records += chunk
            running.update(accuracy.summarise(records))
    summary = _report(use, name, records, accuracy.summarise, metric="accuracy", say=say)
    write_records(results, records)
    say(f"results: {results}")
    return {**summary, "results": str(results)}, records


def _problems(use: Settings, opened: Opened, dataset: Dataset) -> Sequence[Problem]:
    from kitae.data.problems import RenderedProblems

    longest = (opened.context or sys.maxsize) - use.max_new_tokens
    require(
        longest > 0,
        f"max_new_tokens is {use.max_new_tokens}, but the model's context is {opened.context}; lower it",
    )
    problems = RenderedProblems(dataset, template=opened.template, max_prompt_length=longest)
    if not use.raw:
        return problems
    return [_as_raw(problem, opened) for problem in problems]


def _as_raw(problem: Problem, opened: Opened) -> Problem:
    from dataclasses import replace

    raw = opened.ask_raw(problem.prompt)
    return replace(problem, token_ids=raw.token_ids, prefill="")


def _perplexity(use: Settings, dataset: Dataset, *, say: Callable[[str], None]) -> dict[str, Any]:
    from kitae.evaluate import perplexity

    opened = open_model(use)
    rows, columns = [], []
    for example in dataset:
        made = opened.template.rows(example, max_length=use.max_length)
        rows += made
        columns += [example.columns] * len(made)
    require(bool(rows), f"no row has a target within max_length = {use.max_length} tokens; raise it")
    logprobs = perplexity.scorer(opened.policy)
    records = [r for chunk in perplexity.score(rows, logprobs=logprobs, columns=columns) for r in chunk]
    return _report(use, use.model, records, perplexity.summarise, metric="perplexity", say=say)


def _report(
    use: Settings,
    name: str,
    records: list[Any],  # accuracy's or perplexity's records, each with its own summarise
    summarise: Callable[[Iterable[Any]], dict[str, float]],
    *,
    metric: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Say and return the summary, and the same by a column where one is asked for."""
    from kitae.evaluate.groups import by_column, gap

    whole = summarise(records)
    say(f"{name}: {_line(whole)}")
    summary: dict[str, Any] = {"model": name, "dataset": use.dataset_name, **whole}
    if use.by is not None:
        groups = by_column(records, use.by, summarise=summarise)
        width = max(map(len, groups))
        for value, group in groups.items():
            say(f"  {use.by} {value:<{width}}  {_line(group)}")
        widest = gap(groups, metric)
        if widest is not None:
            between = f", {widest.lowest} to {widest.highest}" if widest.gap else ""
            say(f"  gap in {metric}: {widest.gap:.4g}{between}")
        summary |= {"by": use.by, "groups": groups, "gap": widest._asdict() if widest else None}
    return summary


def _line(summary: dict[str, float]) -> str:
    """A summary in one line for a reader."""
    parts = []
    for key in SHOWN:
        if key in summary:
            interval = f" (95 % {summary['low']:.3f} to {summary['high']:.3f})" if key == "accuracy" else ""
            parts.append(f"{key} {summary[key]:.4g}{interval}")
    parts += [f"{key} {value:.4g}" for key, value in summary.items() if key.startswith("pass@")]
    count = f"{summary['problems']:.0f} problems" if "problems" in summary else f"{summary['rows']:.0f} rows"
    return f"{', '.join(parts) or 'nothing to report'}; {count}"


class _Running:
    """The running accuracy: rewritten in place on a terminal, also as tokens come; else a line for each chunk."""

    def __init__(self, name: str, *, total: int) -> None:
        self._name, self._total = name, total
        self._is_terminal = sys.stderr.isatty()
        self._tokens, self._due = 0, 0.0
        self._text = f"{name}: 0 of {total}"

    def on_tokens(self, _problem: int, _sample: int, ids: Sequence[int]) -> None:
        """Count tokens, and show them now and then: the first accuracy may be minutes away."""
        self._tokens += len(ids)
        if self._is_terminal and time.monotonic() >= self._due:
            self._due = time.monotonic() + 0.5
            self._print(f"{self._text}, {self._tokens:,} tokens", end="")

    def update(self, summary: dict[str, float]) -> None:
        """Show the accuracy on what is judged so far."""
        self._text = f"{self._name}: {summary['problems']:.0f} of {self._total}, accuracy {summary.get('accuracy', 0.0):.3f}"
        is_last = summary["problems"] >= self._total
        self._print(self._text, end="" if self._is_terminal and not is_last else "\n")

    def _print(self, text: str, *, end: str) -> None:
        start = "\r\x1b[K" if self._is_terminal else ""
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)


def _results_path(use: Settings, name: str) -> Path:
    """Where one model's results go."""
    if use.results is not None:
        path = Path(use.results)
    else:
        model = Path(name).resolve().name or "model"
        data = Path(use.dataset_name[0].rstrip("/")).stem or "data"
        path = Path("evaluations") / f"{model}-{data}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(
            f"cannot make {path.parent} for the results: {error.strerror or error}; name a file with --results"
        ) from error
    _require_new(path)
    return path


def _require_new(path: Path) -> None:
    if path.exists():
        raise RunDirError(f"{path} exists already; remove it or name another file with --results")
    if not os.access(path.parent, os.W_OK):
        raise RunDirError(f"{path.parent} cannot be written to; name another file with --results")
