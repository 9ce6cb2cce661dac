"""Whether two answers mean the same mathematics, and where in a text the answer is.

    text --final_answer--> answer --normalise--> number, words or list --else math-verify--> equal or not

The reward `math` is 1 for a right final answer and 0 for a wrong one. Symbolic comparison of a hostile answer may
never end, so outside the workers of kitae/rewards/pool.py call `equivalent` only on text you trust.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from typing import Literal, NamedTuple, TypeGuard

from kitae.rewards.normalise import normalise
from kitae.rewards.quantity import as_quantity, same_quantity
from kitae.rewards.structure import (
    Parts,
    as_list,
    assigned_name,
    assigned_value,
    is_relation,
    is_words,
    without_spaces,
)
from kitae.types import Score

MAX_ANSWER = 2000
"""Longer answers are wrong without being read."""

OUT_OF_BUDGET = 0.0
"""What a completion earns whose answer exhausts its time."""


def reward(completion: str, *, prompt: str, answer: str | None, **columns: object) -> Score:
    """1 if the completion's final answer, wherever it stands, equals the gold answer; else 0."""
    if not is_usable(answer):
        return Score(None, "no usable gold answer")
    found, how = final_answer(completion)
    if found is None:
        return Score(0.0, f"no answer ({how})")
    if not equivalent(found, answer):
        return Score(0.0, f"wrong: {found[:100]} ({how}), expected {answer[:100]}")
    return Score(1.0, f"right ({how})")


def is_usable(gold: str | None) -> TypeGuard[str]:
    """Whether a gold answer can be compared with: neither missing, empty nor too long."""
    return gold is not None and bool(gold.strip()) and len(gold) <= MAX_ANSWER


# Finding the answer ----------------------------------------------------------------------------------------------

Place = Literal["answer tag", "boxed", "####", "A:", "last number", "nothing found", "unclosed think"]


class Found(NamedTuple):
    """The answer as written, or None, and where it stood."""

    answer: str | None
    how: Place


LAST_NUMBER = re.compile(r"[+-]?[$]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?|[+-]?\.\d+")


def final_answer(text: str) -> Found:
    """The answer a completion gives: `<answer>`, else the last `\\boxed{}`, `####`, `A:`, or number after `</think>`.

    A completion that was cut off inside its think block has none.
    """
    _, closed, after = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return Found(None, "unclosed think")
    end = after.rfind("</answer>")
    start = after.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return Found(after[start + len("<answer>") : end].strip(), "answer tag")
    boxed = last_boxed(after)
    if boxed is not None:
        return Found(boxed.strip(), "boxed")
    if "####" in after:
        return Found(_line(after.rpartition("####")[2]), "####")
    marked = ("\n" + after).rpartition("\nA:")
    if marked[1]:
        return Found(_line(marked[2]), "A:")
    number = deque(LAST_NUMBER.finditer(after), maxlen=1)
    if number:
        return Found(number[0][0], "last number")
    return Found(None, "nothing found")


def last_boxed(text: str) -> str | None:
    r"""What the last closed \boxed{} (or \fbox{}) holds that lies in no other one, or None."""
    opened: list[int | None] = []
    found = None
    for match in re.finditer(r"\\(?:boxed|fbox)\s{0,3}\{|\\[\\{}]|[{}]", text):
        if match[0] == "{":
            opened.append(None)
        elif match[0] == "}":
            start = opened.pop() if opened else None
            if start is not None:
                found = (start, match.start())
        elif match[0].endswith("{") and len(match[0]) > 2:
            opened.append(match.end())
    return text[found[0] : found[1]] if found else None


def _line(text: str) -> str:
    return text.lstrip().split("\n", 1)[0].strip()


# Comparing -------------------------------------------------------------------------------------------------------


def equivalent(answer: str, gold: str) -> bool:
    """Whether `answer` is mathematically the gold answer.

    Units count only where both name one; 50% is 50 and 0.5; x = 5 is 5, but 6 = 5 is not; lists without round or
    square brackets have no order; words are compared as words. See docs/rewards.md for the whole policy.
    """
    if len(answer) > MAX_ANSWER or len(gold) > MAX_ANSWER or not answer.strip():
        return False
    if answer.strip() == gold.strip():
        return True
    return _same(normalise(answer), normalise(gold))


def _same(answer: str, gold: str) -> bool:
    """The same for normalised text: cheap and exact ways first, symbols last."""
    if not answer or not gold:
        return False
    if without_spaces(answer) == without_spaces(gold):
        return True
    number, gold_number = as_quantity(answer), as_quantity(gold)
    if number and gold_number:
        return same_quantity(number, gold_number)
    value, gold_value = _without_names(answer, gold)
    values, gold_values = as_list(value), as_list(gold_value)
    if len(values.parts) != 1 or len(gold_values.parts) != 1:
        return _same_list(values, gold_values)
    if (values.parts[0], gold_values.parts[0]) != (answer, gold):
        return _same(values.parts[0], gold_values.parts[0])
    if is_words(answer) or is_words(gold):
        return answer.casefold() == gold.casefold()
    if is_relation(answer) != is_relation(gold):
        return False
    return _same_symbolically(answer, gold)


def _without_names(answer: str, gold: str) -> tuple[str, str]:
    """Both without "x =" in front, unless the other side is another statement: y=5 is not x=5."""
    name, gold_name = assigned_name(answer), assigned_name(gold)
    same_name = name == gold_name
    plain = assigned_value(answer) if same_name or not is_relation(gold) else answer
    plain_gold = assigned_value(gold) if same_name or not is_relation(answer) else gold
    return plain, plain_gold


def _same_list(answers: Parts, golds: Parts) -> bool:
    """Equal part by part: in order within round or square brackets, which must agree; else in any order."""
    if len(answers.parts) != len(golds.parts):
        return False
    if answers.is_ordered or golds.is_ordered:
        same_brackets = answers[:2] == golds[:2]
        return same_brackets and all(map(_same, answers.parts, golds.parts))
    left = list(answers.parts)
    for gold in golds.parts:
        match = next((part for part in left if _same(part, gold)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_symbolically(answer: str, gold: str) -> bool:
    from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-untyped]
    from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]

    # The parser for LaTeX only: the one for plain expressions ends in sympy's parse_expr, which evaluates code.
    # Time-outs are off because they need the main thread and signals; the worker that runs this can be killed.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    spelling = NormalizationConfig(
        basic_latex=True, malformed_operators=True, nits=True, units=False, boxed="none"
    )
    latex = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=spelling)]
    parsed, parsed_gold = (
        parse(f"${text.replace('$', '')}$", latex, fallback_mode="no_fallback", parsing_timeout=None)
        for text in (answer, gold)
    )
    return bool(parsed and parsed_gold and verify(parsed_gold, parsed, timeout_seconds=None))
