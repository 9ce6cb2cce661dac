"""The reward lab: completions scored offline, what the scores are like, where rewards disagree, and what fools them.

files --read_cases--> cases --score--> Measured --summary, disagreement--> numbers
cases with a gold answer --SHAPES--> completions nobody should be paid for --score--> findings
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kitae.config import DataSettings, RewardSettings
from kitae.data.formats import RowError, to_example, turn_of, with_our_names
from kitae.data.readers import read_records
from kitae.errors import DataError
from kitae.plugins import names_model, short_names
from kitae.rewards.pool import RewardPool
from kitae.types import Problem, Score

COMPLETIONS = ("completion", "response", "output")
TURNS = ("messages", "conversations", "conversation")
OF_SAMPLES = ("step", "problem", "sample", "reward", "reason", "tokens", "finish_reason", "rewards")
"""What a run's samples.jsonl has beside the data row's own columns."""
MAX_LISTED = 20
BINS = 10
SHAPE_CASES = 20
"""So many problems are enough to see what a shape earns."""
Say = Callable[[int], None]
"""Told how many completions are scored so far."""
ScoreAll = Callable[[Sequence[tuple[str, Problem]]], Sequence[Score]]


# cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One completion to score, and where it stands."""

    where: str
    completion: str
    problem: Problem


def read_cases(paths: Sequence[str], *, columns: dict[str, str], max_rows: int | None) -> list[Case]:
    """The completions of files, in order; DataError lists the rows that hold none."""
    cases: list[Case] = []
    bad: list[str] = []
    rows = 0
    for path in paths:
        for record, where in read_records(Path(path), name=path):
            if max_rows is not None and rows >= max_rows:
                break
            try:
                cases += cases_of(record, columns=columns, where=where, index=rows)
            except RowError as error:
                bad.append(f"{where}: {error}")
            rows += 1
    if bad:
        more = [f"... and {len(bad) - MAX_LISTED} more"] if len(bad) > MAX_LISTED else []
        listed = "\n  ".join([*bad[:MAX_LISTED], *more])
        raise DataError(f"{len(bad)} of {rows} rows have nothing to score:\n  {listed}")
    if not cases:
        raise DataError(f"{', '.join(paths)}: no rows")
    return cases


def cases_of(record: Any, *, columns: dict[str, str], where: str, index: int) -> list[Case]:
    """The completions of one row: a column, a list of them, or the last assistant turn. Record is any JSON value."""
    if isinstance(record, RowError):
        raise record
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise RowError("expected an object or a list of turns")
    row = {name: value for name, value in with_our_names(record, columns).items() if value is not None}
    if {"sample", "finish_reason"} <= row.keys():
        row = {name: value for name, value in row.items() if name not in OF_SAMPLES}
    texts = _take_completions(row)
    example = to_example(row, data=DataSettings(), purpose="rl")
    problem = Problem(
        prompt=example.question[-1]["content"],
        token_ids=[],
        answer=example.answer,
        columns=example.columns,
        messages=example.question,
        index=index,
    )
    numbered = len(texts) > 1
    return [
        Case(where=f"{where} ({i})" if numbered else where, completion=text, problem=problem)
        for i, text in enumerate(texts, 1)
    ]


def _take_completions(row: dict[str, Any]) -> list[str]:
    """The completions, taken out of the row."""
    if "completions" in row:
        several = row.pop("completions")
        if not isinstance(several, list) or not several:
            raise RowError("expected a list of completions", field="completions")
        return [_text_of(one, f"completions[{i}]") for i, one in enumerate(several)]
    for name in COMPLETIONS:
        if name in row:
            return [_text_of(row.pop(name), name)]
    for name in TURNS:
        turns = row.get(name)
        if isinstance(turns, list) and turns:
            last = turn_of(turns[-1], f"{name}[{len(turns) - 1}]")
            if last["role"] in ("assistant", "gpt", "model", "bot") and isinstance(last["content"], str):
                row[name] = turns[:-1]
                return [last["content"]]
    raise RowError("no completion, no completions, and no assistant turn at the end of its messages")


def _text_of(value: Any, name: str) -> str:
    """A completion as text; as turns it is the content of one assistant turn."""
    if isinstance(value, list) and len(value) == 1:
        value = turn_of(value[0], f"{name}[0]")["content"]
    if not isinstance(value, str):
        raise RowError("a completion must be text, or one assistant turn", field=name)
    return value


# scoring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one reward says of every case, and how long each took."""

    name: str
    scores: list[Score]
    seconds: list[float]
    is_model: bool
    """A reward model reads many completions at once, so its seconds are shares of the whole time."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        return [score.value for score in self.scores if score.value is not None]


def measure(
    names: Sequence[str], cases: Sequence[Case], *, settings: RewardSettings, say: Say
) -> list[Measured]:
    """Score all cases with each reward, one after the other, and try the shapes on it."""
    return [
        _measure(name, short, cases, settings=settings, say=say)
        for name, short in zip(names, short_names(names), strict=True)
    ]


def _measure(name: str, short: str, cases: Sequence[Case], *, settings: RewardSettings, say: Say) -> Measured:
    items = [(case.completion, case.problem) for case in cases]
    if names_model(name):
        from kitae.recipes._rewards import RewardModel

        model = RewardModel.load(name)
        began = time.perf_counter()
        scores = model.score(items)
        seconds = [(time.perf_counter() - began) / len(items)] * len(items)
        findings = try_shapes(model.score, cases)
        return Measured(name=short, scores=scores, seconds=seconds, is_model=True, findings=findings)
    # on_error: a completion on which the function fails is a result here, and no reason to stop.
    own = settings.model_copy(update={"function": name, "on_error": "mask"})
    with RewardPool(own) as pool, ThreadPoolExecutor(own.num_workers) as threads:
        timed = []
        for done, result in enumerate(threads.map(partial(_timed, pool), items), 1):
            timed.append(result)
            say(done)
        findings = try_shapes(pool.score, cases)
    return Measured(
        name=short,
        scores=[score for score, _ in timed],
        seconds=[seconds for _, seconds in timed],
        is_model=False,
        findings=findings,
    )


def _timed(pool: RewardPool, item: tuple[str, Problem]) -> tuple[Score, float]:
    """One score, and the seconds it took; there are as many callers as workers, so nobody waits for one."""
    began = time.perf_counter()
    [score] = pool.score([item])
    return score, time.perf_counter() - began


# summaries --------------------------------------------------------------------------------------------------------


def histogram(values: Sequence[float]) -> list[tuple[str, int]]:
    """Label and count of each value where they are few, else of BINS equal ranges."""
    counts = Counter(values)
    if len(counts) <= BINS:
        return [(f"{value:g}", count) for value, count in sorted(counts.items())]
    found, edges = np.histogram(np.asarray(values), bins=BINS)
    return [
        (f"{low:.4g} to {high:.4g}", int(count))
        for low, high, count in zip(edges[:-1], edges[1:], found, strict=True)
    ]


def reasons(scores: Sequence[Score]) -> list[tuple[str, int]]:
    """How often each kind of reason was given, most frequent first; what differs from row to row is left out.

    Example: "wrong: 12, expected 13" counts as "wrong", and "2 <answer>" as "N <answer>".
    """
    kinds = Counter(re.sub(r"\d+(?:\.\d+)?", "N", score.reason.partition(":")[0]) for score in scores)
    return [(kind, count) for kind, count in kinds.most_common() if kind]


def unscored(cases: Sequence[Case], scores: Sequence[Score]) -> dict[str, list[str]]:
    """Why completions could not be scored, each with where they stand."""
    found: dict[str, list[str]] = {}
    for case, score in zip(cases, scores, strict=True):
        if score.value is None:
            found.setdefault(score.reason, []).append(case.where)
    return found


def summary(measured: Measured, cases: Sequence[Case]) -> dict[str, Any]:
    """Everything about one reward as JSON values."""
    values = measured.values
    slowest = sorted(zip(measured.seconds, cases, strict=True), key=lambda pair: -pair[0])[:3]
    numbers = {
        "mean": float(np.mean(values)), "std": float(np.std(values)), "min": min(values), "max": max(values),
    } if values else {}  # fmt: skip
    return {
        "completions": len(cases),
        "scored": len(values),
        **numbers,
        "histogram": histogram(values),
        "reasons": reasons([score for score in measured.scores if score.value is not None]),
        "unscored": unscored(cases, measured.scores),
        "seconds": {
            "median": float(np.median(measured.seconds)),
            "p95": float(np.percentile(measured.seconds, 95)),
            "longest": max(measured.seconds),
            "slowest": [] if measured.is_model else [[case.where, seconds] for seconds, case in slowest],
            "is_share_of_a_batch": measured.is_model,
        },
        "shapes": {finding.shape: finding.mean for finding in measured.findings},
        "notes": [{"kind": f.kind, "text": f.text} for f in measured.findings if f.kind],
    }


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """Two rewards on the cases both could score."""

    first: str
    second: str
    count: int
    spearman: float | None
    """Correlation of the ranks, 1 where they order alike; None where one of them gives everyone the same."""
    opposite: float
    """Share of the cases that one puts above its own mean and the other below."""
    worst: list[tuple[Case, float, float]]
    """The cases whose ranks are farthest apart, with both scores; none where one of them gives everyone the same."""


def disagreement(first: Measured, second: Measured, cases: Sequence[Case], *, top: int) -> Disagreement:
    pairs = [
        (case, a.value, b.value)
        for case, a, b in zip(cases, first.scores, second.scores, strict=True)
        if a.value is not None and b.value is not None
    ]
    a, b = np.array([p[1] for p in pairs]), np.array([p[2] for p in pairs])
    rank_a, rank_b = ranks(a), ranks(b)
    has_spread = len(pairs) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
    apart = np.abs(rank_a - rank_b)
    order = [int(i) for i in np.argsort(-apart, kind="stable")[:top] if apart[i] > 0] if has_spread else []
    return Disagreement(
        first=first.name,
        second=second.name,
        count=len(pairs),
        spearman=float(np.corrcoef(rank_a, rank_b)[0, 1]) if has_spread else None,
        opposite=float(np.mean((a - a.mean()) * (b - b.mean()) < 0)) if has_spread else 0.0,
        worst=[pairs[i] for i in order],
    )


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank. Example: [5, 7, 5] -> [1.5, 3, 1.5]."""
    order = np.sort(values)
    below, upto = np.searchsorted(order, values, "left"), np.searchsorted(order, values, "right")
    return (below + 1 + upto) / 2


# shapes -----------------------------------------------------------------------------------------------------------

WORK = "I read what is asked, take it step by step, check each of them, and come to {answer}."
WRONG = "1000001"
PADDING = "Wait, let me think about that once more. " * 500
FORMS: dict[str, Callable[[str], str]] = {
    "answer tags": "<answer>{}</answer>".format,
    "boxed": lambda answer: f"\\boxed{{{answer}}}",
    "####": "\n#### {}".format,
    "a sentence": " The answer is {}.".format,
}
"""How a final answer may be written; the shapes use the form in which the reward pays an honest answer best."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a shape is made of: one problem, a right and a wrong answer, and the form of a final answer."""

    prompt: str
    right: str
    wrong: str
    others: list[str]
    final: Callable[[str], str]

    def whole(self, thinking: str, answer: str) -> str:
        return f"<think>{thinking}</think>{self.final(answer)}"

    def honest(self, answer: str) -> str:
        return self.whole(WORK.format(answer=answer), answer)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A way to be paid without the work."""

    name: str
    make: Callable[[Draft], str]
    kind: Literal["note", "warning"]
    """note: it holds the right answer after all, so some rewards pay it by their rule."""
    advice: str


SHAPES: tuple[Shape, ...] = (
    Shape(
        name="right answer, empty think block",
        make=lambda d: d.whole("", d.right),
        kind="note",
        advice="the policy may stop thinking; watch rollout/completion_length, or let a reward of your own ask for more",
    ),
    Shape(
        name="right answer 20 times over",
        make=lambda d: d.honest(d.right) + d.final(d.right) * 19,
        kind="note",
        advice="ask for one answer, as reasoning does with reward.form answer_tags",
    ),
    Shape(
        name="right answer inside think only",
        make=lambda d: f"<think>{d.final(d.right)}</think>",
        kind="note",
        advice="read what stands behind </think> only, as reasoning does",
    ),
    Shape(
        name="right answer after long padding",
        make=lambda d: d.whole(PADDING, d.right),
        kind="note",
        advice="length costs nothing; rollout.overlong_buffer makes it cost, and rollout.max_new_tokens bounds it",
    ),
    Shape(
        name="wrong answer after long padding",
        make=lambda d: d.whole(PADDING, d.wrong),
        kind="warning",
        advice="length alone is paid",
    ),
    Shape(
        name="list of candidates with the right one",
        make=lambda d: d.honest(", ".join([*d.others[:4], d.right, *d.others[4:8]])),
        kind="warning",
        advice="compare the whole answer with the gold one, not whether the gold one occurs in it",
    ),
    Shape(
        name="prompt repeated 5 times",
        make=lambda d: d.whole(f"{d.prompt} " * 5, d.prompt),
        kind="warning",
        advice="the question passes for its own answer (2+3 equals 5); a reward of your own can ask for a worked-out one",
    ),
    Shape(
        name="tags with nothing in them",
        make=lambda d: d.whole("", ""),
        kind="warning",
        advice="it answers nothing",
    ),
    Shape(name="nothing at all", make=lambda d: "", kind="warning", advice="it answers nothing"),
)
HONEST_RIGHT, HONEST_WRONG = "honest right answer", "honest wrong answer"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a shape earns on average (None: it could not be scored), and what is to be said of that."""

    shape: str
    mean: float | None
    kind: Literal["", "note", "warning"] = ""
    text: str = ""


def try_shapes(score: ScoreAll, cases: Sequence[Case]) -> list[Finding]:
    """What an honest right answer, an honest wrong one and each shape earn on the cases' own problems.

    Empty where no case has a gold answer.
    """
    problems = _problems_with_answers(cases)
    if not problems:
        return []
    means = partial(_mean_score, score, problems)
    honest = {name: means(final, lambda d: d.honest(d.right)) for name, final in FORMS.items()}
    best = max(FORMS, key=lambda name: _or_lowest(honest[name]))
    right, wrong = honest[best], means(FORMS[best], lambda d: d.honest(d.wrong))
    findings = [Finding(shape=f"{HONEST_RIGHT} ({best})", mean=right), _of_wrong(right, wrong)]
    for shape in SHAPES:
        mean = means(FORMS[best], shape.make)
        is_paid = mean is not None and right is not None and _is_as_good(mean, right=right, wrong=wrong)
        text = (
            f"pays {shape.name} like an honest answer ({mean:.3g} and {right:.3g}): {shape.advice}"
            if is_paid
            else ""
        )
        findings.append(Finding(shape=shape.name, mean=mean, kind=shape.kind if is_paid else "", text=text))
    return findings


def _or_lowest(mean: float | None) -> float:
    return -math.inf if mean is None else mean


def _of_wrong(right: float | None, wrong: float | None) -> Finding:
    if right is None or wrong is None or right > wrong:
        return Finding(shape=HONEST_WRONG, mean=wrong)
    text = (
        f"pays a wrong answer like a right one ({wrong:.3g} and {right:.3g}): it does not look at the answer"
    )
    return Finding(shape=HONEST_WRONG, mean=wrong, kind="note", text=text)


def _is_as_good(mean: float, *, right: float, wrong: float | None) -> bool:
    """Within a twentieth of the way from a wrong answer to a right one."""
    slack = 0.0 if wrong is None else 0.05 * max(right - wrong, 0.0)
    return mean >= right - slack - 1e-9


def _problems_with_answers(cases: Sequence[Case]) -> list[tuple[Problem, str, list[str]]]:
    """Distinct problems that have an answer, each with that and with other answers."""
    distinct = {(c.problem.prompt, c.problem.answer): c.problem for c in cases if c.problem.answer}
    answers = sorted({answer for _, answer in distinct if answer})
    spare = [str(number) for number in range(1001, 1010)]
    return [
        (problem, answer, [other for other in answers + spare if other != answer])
        for (_, answer), problem in list(distinct.items())[:SHAPE_CASES]
        if answer is not None
    ]


def _mean_score(
    score: ScoreAll,
    problems: Sequence[tuple[Problem, str, list[str]]],
    final: Callable[[str], str],
    make: Callable[[Draft], str],
) -> float | None:
    drafts = [
        (Draft(prompt=problem.prompt, right=right, wrong=WRONG, others=others, final=final), problem)
        for problem, right, others in problems
    ]
    scores = score([(make(draft), problem) for draft, problem in drafts])
    values = [found.value for found in scores if found.value is not None]
    return float(np.mean(values)) if values else None


def rows_of(measured: Sequence[Measured], cases: Sequence[Case]) -> list[Mapping[str, Any]]:
    """Every case with what each reward says of it, as JSON values."""
    return [
        {
            "where": case.where,
            "scores": {m.name: m.scores[i].value for m in measured},
            "reasons": {m.name: m.scores[i].reason for m in measured},
        }
        for i, case in enumerate(cases)
    ]
