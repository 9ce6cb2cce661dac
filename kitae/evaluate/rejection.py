"""Which of the answers become SFT rows: right ones, few of each problem, no two alike.

asked.jsonl --_index--> answers without their texts --_ordered--> the preferred ones of a problem --_row_text--> rows.jsonl

Cf. arXiv:2501.12948, section 2.3.3.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import xxhash

from kitae.config import DataSettings
from kitae.data.formats import Example, Message, RowError, to_example
from kitae.evaluate.answers import Answer, Place, read_asked
from kitae.train.files import disk_errors

MAX_VALUES = 4
"""So many different rewards are counted one by one."""


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
        # A signal struck between writing it and noting that.
        if (
            answer["problem"],
            answer["sample"],
        ) in seen:
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
