"""Accuracy on problems with gold answers: generate, find the answer, compare it as mathematics.

    problems --engine--> rollouts --judge--> Records --summarise--> accuracy with its interval, pass@k, format rate

The answer is read wherever it stands (kitae/rewards/math.py, `final_answer`), so accuracy does not depend on the form;
the form and the run's own reward are reported beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from kitae.algos.intervals import wilson
from kitae.config import SamplingSettings
from kitae.evaluate.records import Record
from kitae.evaluate.stats import pass_at_k
from kitae.rewards import reasoning
from kitae.rewards.base import Rewarder
from kitae.rewards.math import final_answer, is_usable
from kitae.rollout.base import OnTokens, RolloutEngine
from kitae.types import Problem, Rollout


def answer(
    engine: RolloutEngine,
    problems: Sequence[Problem],
    *,
    pool: Rewarder,
    sampling: SamplingSettings,
    n: int = 1,
    seed: int = 0,
    problems_at_once: int = 64,
    on_tokens: OnTokens | None = None,
) -> Iterator[list[Record]]:
    """Generate and judge `n` completions per problem; yields after every `problems_at_once` problems.

    The records do not depend on problems_at_once, which only says how often there is something to show.
    """
    for start in range(0, len(problems), problems_at_once):
        chunk = problems[start : start + problems_at_once]
        groups = engine.generate(chunk, n=n, sampling=sampling, seed=seed, on_tokens=on_tokens)
        yield judge(groups, pool=pool)


def judge(groups: Sequence[Sequence[Rollout]], *, pool: Rewarder) -> list[Record]:
    """A record per rollout: its answer and whether that is right, its form, and the pool's reward."""
    flat = [(number, rollout) for group in groups for number, rollout in enumerate(group)]
    found = [final_answer(rollout.text) for _, rollout in flat]
    scores = pool.score([(rollout.text, rollout.problem) for _, rollout in flat])

    comparable = [
        (place, answer, gold)
        for place, ((_, rollout), (answer, _)) in enumerate(zip(flat, found, strict=True))
        if answer is not None and is_usable(gold := rollout.problem.answer)
    ]
    verdicts = pool.compare([(answer, gold) for _, answer, gold in comparable])
    is_same = {place: verdict.value for (place, _, _), verdict in zip(comparable, verdicts, strict=True)}

    settings = pool.settings
    records: list[Record] = []
    for place, ((number, rollout), (answer, how), score) in enumerate(zip(flat, found, scores, strict=True)):
        problem = rollout.problem
        form = reasoning.read(rollout.text, form=settings.form, strict_form=settings.strict_form)
        records.append(
            {
                "problem": problem.index,
                "sample": number,
                "prompt": problem.prompt,
                "completion": rollout.text,
                "answer": problem.answer,
                "found": answer,
                "how": how,
                "correct": is_same.get(place) == 1.0 if is_usable(problem.answer) else None,
                "right_form": not form.problem,
                "reward": score.value,
                "reason": score.reason,
                "num_tokens": rollout.num_tokens,
                "finish_reason": rollout.finish_reason,
                "columns": json.loads(json.dumps(problem.columns, default=str)),
            }
        )
    return records


def summarise(records: Iterable[Record]) -> dict[str, float]:
    """What the records amount to, as means over completions; see docs/metrics.md for each name.

    low and high are the Wilson 95 % interval of accuracy. Completions of one problem are not independent, so the
    interval counts problems. With several samples per problem, pass@k is there for k = 1, 2, 4 ... up to their number.
    """
    records = sorted(records, key=lambda record: (record["problem"], record["sample"]))
    if not records:
        return {"problems": 0, "completions": 0}
    graded = [record for record in records if record["correct"] is not None]
    rewards = [record["reward"] for record in records if record["reward"] is not None]
    summary: dict[str, float] = {
        "problems": len({record["problem"] for record in records}),
        "completions": len(records),
    }
    if graded:
        summary |= _correctness(graded)
    if rewards:
        summary["mean_reward"] = math.fsum(rewards) / len(rewards)
    return summary | {
        "format_rate": _mean(record["right_form"] for record in records),
        "mean_length": _mean(record["num_tokens"] for record in records),
        "truncated": _mean(record["finish_reason"] == "length" for record in records),
        "unscored": _mean(record["reward"] is None for record in records),
    }


def _correctness(graded: Sequence[Record]) -> dict[str, float]:
    """Accuracy, its interval and pass@k of records sorted by problem."""
    counts = []  # (samples, right ones) of each problem
    for _, group in groupby(graded, key=lambda record: record["problem"]):
        correct = [record["correct"] is True for record in group]
        counts.append((len(correct), sum(correct)))
    accuracy = _mean(record["correct"] is True for record in graded)
    low, high = wilson(accuracy * len(counts), len(counts))
    fewest = min(samples for samples, _ in counts)
    passes = {
        f"pass@{k}": _mean(pass_at_k(samples, right, k) for samples, right in counts)
        for k in _powers_of_two_up_to(fewest)
        if fewest > 1
    }
    return {"accuracy": accuracy, "low": low, "high": high, **passes}


def _powers_of_two_up_to(n: int) -> list[int]:
    """1, 2, 4 ... and n itself. Example: 6 -> [1, 2, 4, 6]."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
