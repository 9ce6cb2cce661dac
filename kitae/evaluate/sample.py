"""Rejection sampling: a teacher answers problems several times, a reward judges, the right answers become SFT rows.

    problems --ask_engine or ask_endpoint--> answers with scores --Asked--> asked.jsonl --select--> rows.jsonl

Every answer is on the disk as soon as it is judged, so that nothing is asked twice; what is kept of them is decided at
the end, from the file alone, and can be decided anew without asking. Cf. arXiv:2501.12948, section 2.3.3.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import xxhash

from kitae.config import DataSettings, SamplingSettings
from kitae.data.formats import Example, Message, RowError, to_example
from kitae.errors import DataError, LockedError
from kitae.rewards.base import Rewarder
from kitae.rewards.reasoning import RIGHT_ANSWER
from kitae.rollout.choose import LocalEngine
from kitae.rollout.http import HttpEngine, RequestRefused
from kitae.train.files import JsonLines, disk_errors
from kitae.types import Problem, Rollout, Score

Place = tuple[int, int]
"""A problem's index and the answer's number among those to it, from 0."""
OnAnswers = Callable[[list["Answer"]], None]
MAX_VALUES = 4
"""So many different rewards are counted one by one."""


class Answer(TypedDict):
    """One answer with its judgement: a line of asked.jsonl."""

    problem: int
    """The problem's index in its data."""
    sample: int
    prompt: str
    completion: str
    answer: str | None
    """The gold answer."""
    reward: float | None
    reason: str
    label: bool | None
    """Whether it earned a right answer's reward; with it the file is KTO's data, and SFT refuses it."""
    num_tokens: int
    finish_reason: str
    time: float
    """When it was judged, in seconds since 1970."""


class Asked:
    """The file of all answers so far, held by one process; a torn last line is cut off when it is opened."""

    def __init__(self, path: Path, *, anew: bool = False) -> None:
        """`anew` forgets what is there."""
        self.path = path
        with disk_errors(path):
            self._held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._held)
            raise LockedError(
                f"{path} is being written by another process; wait for it or stop it"
            ) from error
        try:
            self._lines = JsonLines(path)
            if anew:
                self._lines.cut(0)
            self.places: set[Place] = {(a["problem"], a["sample"]) for _, a in read_asked(path)}
        except BaseException:
            os.close(self._held)
            raise

    def append(self, answers: Sequence[Answer]) -> list[Answer]:
        """Write the answers that are new, and return them.

        A local model answers whole groups: after a kill between two lines of one, it repeats what is there already.
        """
        new = [answer for answer in answers if (answer["problem"], answer["sample"]) not in self.places]
        self._lines.append(*new)
        self.places |= {(answer["problem"], answer["sample"]) for answer in new}
        return new

    def close(self) -> None:
        """Wait until the disk has everything, and let others have the file."""
        self._lines.sync()
        self._lines.close()
        os.close(self._held)


def read_asked(path: Path) -> Iterator[tuple[int, Answer]]:
    """(where its line begins, answer) for every line."""
    start = 0
    with disk_errors(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                answer: Answer = json.loads(line)
                missing = Answer.__required_keys__ - answer.keys()
            except (ValueError, AttributeError):
                missing = frozenset(["an object"])
            if missing:
                raise DataError(
                    f"{path}:{number} is damaged (it lacks {', '.join(sorted(missing))}); remove that line, and its "
                    "problem is asked again"
                )
            yield start, answer
            start += len(line)


# asking -------------------------------------------------------------------------------------------------------


def ask_engine(
    engine: LocalEngine,
    problems: Sequence[Problem],
    *,
    n: int,
    sampling: SamplingSettings,
    seed: int,
    pool: Rewarder,
    on_answers: OnAnswers,
    on_token: Callable[[], None],
    problems_at_once: int,
) -> None:
    """Ask a local model; `on_answers` gets all n answers to a problem at once, as soon as they are there.

    What is answered depends on neither problems_at_once nor on which problems were asked before.
    """
    for start in range(0, len(problems), problems_at_once):
        chunk = problems[start : start + problems_at_once]
        groups = _Groups(n=n, pool=pool, on_answers=on_answers)

        def on_tokens(_place: int, _sample: int, ids: list[int]) -> None:
            for _ in ids:
                on_token()

        try:
            engine.generate(
                chunk, n=n, sampling=sampling, seed=seed, on_tokens=on_tokens, on_rollout=groups.add
            )
        finally:  # also when a signal ends it: what is answered stays answered
            groups.settle()


class _Groups:
    """Collects completions as they end. A group that is complete is judged while the others go on."""

    def __init__(self, *, n: int, pool: Rewarder, on_answers: OnAnswers) -> None:
        self._n, self._pool, self._on_answers = n, pool, on_answers
        self._groups: dict[int, dict[int, Rollout]] = {}
        self._judged: tuple[list[Rollout], Iterator[Score]] | None = None

    def add(self, place: int, sample: int, rollout: Rollout) -> None:
        group = self._groups.setdefault(place, {})
        group[sample] = rollout
        if len(group) == self._n:
            del self._groups[place]
            self._judge([group[sample] for sample in range(self._n)])

    def _judge(self, rollouts: list[Rollout]) -> None:
        """Hand the group to the reward's processes, and take what they say of the group before."""
        scores = self._pool.score_iter([(r.text, r.problem) for r in rollouts])
        self.settle()
        self._judged = rollouts, scores

    def settle(self) -> None:
        if self._judged is not None:
            rollouts, scores = self._judged
            self._judged = None
            judged = zip(rollouts, scores, strict=True)
            name = self._pool.settings.function
            self._on_answers(
                [answer_of(r, score, sample=s, function=name) for s, (r, score) in enumerate(judged)]
            )


def ask_endpoint(
    engine: HttpEngine,
    wanted: Iterable[tuple[Problem, int]],
    *,
    sampling: SamplingSettings,
    seed: int,
    pool: Rewarder,
    on_answers: OnAnswers,
    skips_refused: bool,
) -> None:
    """Ask an endpoint for (problem, number of the answer); `on_answers` gets each as soon as it is judged.

    `skips_refused`: a request that the server does not take counts as an empty answer that could not be scored.
    """
    judged: deque[Answer] = deque()

    def ask(item: tuple[Problem, int]) -> None:
        problem, sample = item
        try:
            rollout = engine.ask(problem, sample, sampling=sampling, seed=seed)
        except RequestRefused as error:
            if not skips_refused:
                raise
            nothing = Rollout(problem=problem, text="", token_ids=[], logprobs=[], finish_reason="length")
            refused = Score(None, f"refused: {error}")
            judged.append(answer_of(nothing, refused, sample=sample, function=pool.settings.function))
            return
        [score] = pool.score([(rollout.text, problem)])
        judged.append(answer_of(rollout, score, sample=sample, function=pool.settings.function))

    def take() -> None:
        found = list(judged)
        on_answers(found)
        for _ in found:  # after they are written: a signal may strike at any instant
            judged.popleft()

    try:
        for _ in engine.each(wanted, ask):
            take()
    finally:  # also when a signal ends it: what is answered stays answered
        take()


def answer_of(rollout: Rollout, score: Score, *, sample: int, function: str) -> Answer:
    """What is kept of a rollout judged by the reward `function`."""
    return {
        "problem": rollout.problem.index,
        "sample": sample,
        "prompt": rollout.problem.prompt,
        "completion": rollout.text,
        "answer": rollout.problem.answer,
        "reward": score.value,
        "reason": score.reason,
        "label": None if score.value is None else score.value >= right_reward(function),
        "num_tokens": rollout.num_tokens,
        "finish_reason": rollout.finish_reason,
        "time": round(time.time(), 3),
    }


# keeping ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which answers become rows."""

    min_reward: float
    keep: int
    choose: Literal["first", "shortest", "random"]
    min_pass_rate: float
    max_pass_rate: float
    seed: int


class _Entry(NamedTuple):
    """An answer without its text."""

    problem: int
    sample: int
    start: int
    length: int
    is_right: bool
    is_cut: bool
    digest: int


def right_reward(function: str) -> float:
    """The reward of a right answer: 10 for the reasoning reward, 1 for any other."""
    return RIGHT_ANSWER if function == "reasoning" else 1.0


def select(
    asked: Path,
    dataset: Sequence[Example],
    *,
    by: Filter,
    source: Mapping[str, Any],
    system_prompt: str | None,
    output: Path,
) -> dict[str, Any]:
    """Write the kept answers as SFT rows, in the order of the data, and return what became of all answers.

    `source` says who was asked and how, as JSON values; each row carries it, with what is the row's own. The file
    appears under its name when it is complete.
    """
    entries, summary = _index(asked, by=by)
    dropped: Counter[str] = summary["dropped"]
    seen: set[bytes] = set()
    part = output.with_name(f".tmp-{output.name}")
    num_rows, sources = 0, set()
    with disk_errors(output), part.open("w", encoding="utf-8") as file, asked.open("rb") as answers:
        for problem in sorted(entries):
            kept = 0
            for entry in _ordered(entries[problem], by=by, dropped=dropped):
                if kept == by.keep:
                    dropped["more than keep"] += 1
                    continue
                answers.seek(entry.start)
                answer: Answer = json.loads(answers.readline())
                example = dataset[problem]
                text = _row_text(example, answer, source=source, system_prompt=system_prompt, dropped=dropped)
                if text is None:
                    continue
                same = f"{json.dumps(example.question)}\0{answer['completion'].strip()}"
                digest = xxhash.xxh3_128_digest(same.encode())
                if digest in seen:  # two problems of the data are the same
                    dropped["duplicate"] += 1
                    continue
                seen.add(digest)
                file.write(text)
                kept, num_rows = kept + 1, num_rows + 1
                sources.add(problem)
    with disk_errors(output):
        part.replace(output)
    return summary | {
        "kept": num_rows,
        "problems_kept": len(sources),
        "dropped": {reason: count for reason, count in dropped.most_common() if count},
    }


def _index(asked: Path, *, by: Filter) -> tuple[dict[int, list[_Entry]], dict[str, Any]]:
    """The answers of each problem in order of their numbers, and the totals."""
    entries: dict[int, list[_Entry]] = defaultdict(list)
    reasons: Counter[str | float] = Counter()
    dropped: Counter[str] = Counter()
    tokens = right = 0
    seen: set[Place] = set()
    for start, answer in read_asked(asked):
        if (
            answer["problem"],
            answer["sample"],
        ) in seen:  # a signal struck between writing it and noting that
            continue
        seen.add((answer["problem"], answer["sample"]))
        reward, text = answer["reward"], answer["completion"].strip()
        is_right = reward is not None and reward >= by.min_reward
        is_cut = answer["finish_reason"] == "length"
        right += is_right
        tokens += answer["num_tokens"]
        reasons[_kind(answer)] += 1
        if reward is None:
            dropped["could not be scored"] += 1
        elif not is_right:
            dropped["reward too low"] += 1
        elif is_cut:
            dropped["cut at max_new_tokens"] += 1
        digest = xxhash.xxh3_64_intdigest(text.encode(errors="replace"))
        entries[answer["problem"]].append(
            _Entry(answer["problem"], answer["sample"], start, len(text), is_right, is_cut, digest)
        )
    for own in entries.values():
        own.sort(key=lambda entry: entry.sample)
    answers = sum(map(len, entries.values()))
    return entries, {
        "problems": len(entries),
        "answers": answers,
        "right": right,
        "right_share": right / answers if answers else 0.0,
        "solved": sum(any(entry.is_right for entry in own) for own in entries.values()),
        "tokens": tokens,
        "reasons": dict(_merged(reasons).most_common()),
        "dropped": dropped,
    }


def _kind(answer: Answer) -> str | float:
    """A reason without the particulars of its answer: "wrong: 5, expected 6" -> "wrong"; without one, the reward."""
    named = answer["reason"].partition(":")[0].strip()[:60]
    if answer["reward"] is None:
        return f"could not be scored: {named}".removesuffix(": could not be scored")
    return named or answer["reward"]


def _merged(kinds: Mapping[str | float, int]) -> Counter[str]:
    """Rewards without a reason by name: each where they are few, else together, since a graded one has no end of them."""
    values = [kind for kind in kinds if not isinstance(kind, str)]
    together = f"rewards from {min(values):.4g} to {max(values):.4g}" if len(values) > MAX_VALUES else None
    found: Counter[str] = Counter()
    for kind, count in kinds.items():
        found[kind if isinstance(kind, str) else together or f"reward {kind:g}"] += count
    return found


def _ordered(group: Sequence[_Entry], *, by: Filter, dropped: Counter[str]) -> list[_Entry]:
    """The answers of one problem that may be kept, the preferred ones first."""
    fit = [entry for entry in group if entry.is_right and not entry.is_cut]
    rate = sum(entry.is_right for entry in group) / len(group)
    if not by.min_pass_rate <= rate <= by.max_pass_rate:
        dropped["pass rate"] += len(fit)
        return []
    distinct = list({entry.digest: entry for entry in reversed(fit)}.values())[::-1]
    dropped["duplicate"] += len(fit) - len(distinct)
    distinct.sort(key=lambda entry: entry.sample)
    if by.choose == "shortest":
        distinct.sort(key=lambda entry: entry.length)
    elif by.choose == "random":
        random.Random(f"{by.seed}/{group[0].problem}").shuffle(distinct)
    return distinct


def _row_text(
    example: Example,
    answer: Answer,
    *,
    source: Mapping[str, Any],
    system_prompt: str | None,
    dropped: Counter[str],
) -> str | None:
    """The row as a line of JSON; None, counted with its reason, for text that SFT would refuse."""
    completion = answer["completion"]
    messages: list[Message] = [*example.question, {"role": "assistant", "content": completion}]
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    row: dict[str, Any] = {"messages": messages}
    if answer["answer"] is not None:
        row["answer"] = answer["answer"]
    own = ("reward", "reason", "problem", "sample", "num_tokens", "time")
    row["source"] = {**source, **{name: answer.get(name) for name in own}, "row": example.source}
    try:
        to_example(row, data=DataSettings(), purpose="sft")
        text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        text.encode("utf-8")
        if "\0" in completion:
            raise RowError("NUL character in text")
        if "<think>" in completion and "</think>" not in completion:
            raise RowError("opens <think> and never closes it")
    except (RowError, ValueError) as error:
        dropped[f"not teachable: {error}"[:100]] += 1
        return None
    return text
