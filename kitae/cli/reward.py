"""Try a reward on completions, offline: kitae reward test REWARD DATA (score them, compare rewards, see what fools them)."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kitae.cli import _help
from kitae.cli._open import warn_on_stderr
from kitae.cli._output import write_json
from kitae.config import RewardSettings, Section
from kitae.errors import ConfigError
from kitae.plugins import did_you_mean
from kitae.settings import read

if TYPE_CHECKING:
    from kitae.cli._cases import Case
    from kitae.cli._lab import Disagreement, Measured

VERBS = ("test",)
BAR = 30
SECONDS_BETWEEN_LINES = 10.0


class Settings(Section):
    """Score a file of completions, and try what would fool the reward."""

    rewards: list[str]
    """Built-in names, your own functions as file.py:function or package.module:function, or reward models' folders."""
    data: list[str]
    """Files of rows with completions (JSONL, JSON, CSV, Parquet); a run's samples.jsonl is one."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column mapping, ours = yours, such as completion = "text"."""
    max_rows: int | None = Field(None, ge=1)
    """Use only the first rows."""
    form: Literal["answer_tags", "boxed"] = "answer_tags"
    """Form of the reasoning reward."""
    strict_form: bool = True
    """Nothing but white space around and between the blocks; false allows other text there."""
    timeout_s: float = Field(1.0, gt=0)
    """Limit for judging one completion, as reward.timeout_s; raise it to see how long a slow reward takes."""
    num_workers: int = Field(2, ge=1)
    """Worker processes; more are faster where there are cores for them."""
    top: int = Field(10, ge=1)
    """How many of the rows where two rewards disagree most are shown."""
    json_file: str | None = None
    """Also write everything to this file as JSON (--json FILE), with the scores of every row."""


def main(argv: list[str]) -> int:
    """Score, and print what the scores are like."""
    if not argv or (_help.is_asked(argv) and argv[0] not in VERBS):
        print("usage: kitae reward test REWARD [REWARD ...] DATA [...]    kitae reward test --help")
        return 0
    if argv[0] not in VERBS:
        raise ConfigError(f"there is no kitae reward {argv[0]}; {did_you_mean(argv[0], VERBS)}")
    if _help.is_asked(argv):
        _help.show(Settings, prog="kitae reward test REWARD [REWARD ...] DATA [DATA ...]")
        return 0
    use, notes = read("reward", Settings, as_flags(argv[1:]))
    warn_on_stderr(notes.warnings)

    from kitae.cli import _cases, _lab

    twice = [name for i, name in enumerate(use.rewards) if name in use.rewards[:i]]
    if twice:
        raise ConfigError(f"{twice[0]} is named twice; name two different rewards to compare them")
    cases = _cases.read_cases(use.data, columns=use.columns, max_rows=use.max_rows)
    settings = RewardSettings(
        form=use.form, strict_form=use.strict_form, timeout_s=use.timeout_s, num_workers=use.num_workers
    )
    measured = _lab.measure(use.rewards, cases, settings=settings, say=_Progress(len(cases)))
    summaries = {one.name: _lab.summary(one, cases) for one in measured}
    apart = [
        _lab.disagreement(first, second, cases, top=use.top)
        for i, first in enumerate(measured)
        for second in measured[i + 1 :]
    ]
    print(f"{len(cases)} completions of {', '.join(use.data)}")
    for one in measured:
        print("\n" + text_of(one, summaries[one.name]))
    for pair in apart:
        print("\n" + text_of_disagreement(pair))
    if use.json_file:
        found = {"data": use.data, "rewards": summaries, "disagreements": [as_json(pair) for pair in apart]}
        write_json(use.json_file, {**found, "rows": _lab.rows_of(measured, cases)})
    return 0


def as_flags(words: Sequence[str]) -> list[str]:
    """The bare words in front as flags: those at their end that name files of rows are data, the others rewards."""
    from kitae.data.readers import READERS

    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    bare, rest = list(words[:count]), list(words[count:])
    first = len(bare)
    while first and Path(bare[first - 1]).suffix.lower() in READERS:
        first -= 1
    flags = ["--rewards", *bare[:first]] if first else []
    flags += ["--data", *bare[first:]] if bare[first:] else []
    missing = [name for name in ("rewards", "data") if f"--{name}" not in flags and f"--{name}" not in rest]
    if missing:
        what = {"rewards": "no reward is named", "data": f"no file of rows is named ({', '.join(READERS)})"}
        raise ConfigError(f"{what[missing[0]]}; usage: kitae reward test REWARD [REWARD ...] DATA [DATA ...]")
    return [*flags, *rest]


class _Progress:
    """Says now and then how far the scoring is."""

    def __init__(self, total: int) -> None:
        self._total, self._said = total, time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            print(f"{done:,} of {self._total:,} completions scored", file=sys.stderr)


# for a reader -----------------------------------------------------------------------------------------------------


def text_of(measured: Measured, found: Mapping[str, Any]) -> str:
    """One reward: distribution, reasons, time, what could not be scored, shapes, notes."""
    total, scored = found["completions"], found["scored"]
    lines = [f"{measured.name}: scored {scored} of {total}"]
    if scored:
        lines[0] += "   mean {mean:.4g}   std {std:.4g}   min {min:.4g}   max {max:.4g}".format(**found)
        lines += _bars(found["histogram"], total=scored)
    if found["reasons"]:
        listed = ", ".join(f"{kind} {count / scored:.1%}" for kind, count in found["reasons"][:10])
        lines.append(f"  reasons: {listed}")
    for reason, where in found["unscored"].items():
        more = f", and {len(where) - 5} more" if len(where) > 5 else ""
        lines.append(f"  could not be scored: {len(where)} x {reason} ({', '.join(where[:5])}{more})")
    lines.append(f"  time per completion: {_time_of(found['seconds'])}")
    if measured.findings:
        lines.append("  what it pays, on average over the rows' own problems:")
        width = max(len(finding.shape) for finding in measured.findings)
        for finding in measured.findings:
            paid = "could not be scored" if finding.mean is None else f"{finding.mean:.4g}"
            lines.append(f"    {finding.shape:<{width}}  {paid}")
        lines += [f"  {f.kind}: {measured.name} {f.text}" for f in measured.findings if f.kind]
    else:
        lines.append("  no row has a gold answer, so nothing was made up to fool it")
    return "\n".join(lines)


def _bars(counts: Sequence[tuple[str, int]], *, total: int) -> list[str]:
    width = max(len(label) for label, _ in counts)
    most = max(count for _, count in counts)
    return [
        f"  {label:>{width}}  {'#' * round(BAR * count / most):<{BAR}} {count} ({count / total:.1%})"
        for label, count in counts
    ]


def _time_of(seconds: Mapping[str, Any]) -> str:
    if seconds["is_share_of_a_batch"]:
        return f"{_short(seconds['median'])}, in batches"
    slowest = ", ".join(f"{where} {_short(s)}" for where, s in seconds["slowest"])
    return f"median {_short(seconds['median'])}, 95 % within {_short(seconds['p95'])}; slowest {slowest}"


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def text_of_disagreement(found: Disagreement) -> str:
    """Two rewards compared, and the rows to look at."""
    both = f"{found.first} and {found.second}"
    if not found.count:
        return f"{both}: no completion that both could score"
    alike = (
        "one of them gives every row the same"
        if found.spearman is None
        else f"rank correlation {found.spearman:.3f}"
    )
    lines = [
        f"{both}, {found.count} completions: {alike}; on {found.opposite:.1%} one is above its "
        "mean and the other below"
    ]
    for case, first, second in found.worst:
        lines.append(f"  {case.where}: {first:.4g} and {second:.4g}  {_excerpt(case)}")
    return "\n".join(lines)


def as_json(found: Disagreement) -> dict[str, Any]:
    return {
        "first": found.first,
        "second": found.second,
        "completions": found.count,
        "spearman": found.spearman,
        "opposite": found.opposite,
        "worst": [
            {"where": case.where, "scores": [first, second], "completion": case.completion}
            for case, first, second in found.worst
        ],
    }


def _excerpt(case: Case, *, length: int = 80) -> str:
    text = " ".join(case.completion.split())
    return repr(text if len(text) <= length else f"{text[: length - 3]}...")
