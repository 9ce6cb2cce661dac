"""The reasoning reward: 0 for a wrong form, 1 for the right form with a wrong answer, 10 for both right.

The form is `<think>…</think><answer>…</answer>`, or with form="boxed" `<think>…</think>` and a last `\\boxed{…}`.
Rule rewards as in arXiv:2501.12948, section 2.2.2.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from kitae.rewards.math import MAX_ANSWER, equivalent, is_usable, last_boxed
from kitae.types import Score

Form = Literal["answer_tags", "boxed"]

WRONG_FORM, RIGHT_FORM, RIGHT_ANSWER = 0.0, 1.0, 10.0

OUT_OF_BUDGET = RIGHT_FORM
"""What a completion earns whose answer exhausts its time: judging it only takes long once its form is right."""

THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"


def reward(
    completion: str,
    *,
    prompt: str,
    answer: str | None,
    form: Form = "answer_tags",
    strict_form: bool = True,
    **columns: object,
) -> Score:
    """Judge form and answer of one completion, which begins with the `<think>` that its prompt may have prefilled.

    strict_form allows nothing but white space around and between the blocks. A gold answer that is empty or
    too long to compare makes the completion unscorable: value None.
    """
    if not is_usable(answer):
        return Score(None, "no usable gold answer")
    found, problem = read(completion, form=form, strict_form=strict_form)
    if problem:
        return Score(WRONG_FORM, problem)
    if len(found) > MAX_ANSWER:
        return Score(RIGHT_FORM, f"wrong: answer of {len(found)} characters, at most {MAX_ANSWER} are read")
    if not equivalent(found, answer):
        return Score(RIGHT_FORM, f"wrong: {found[:100]}, expected {answer[:100]}")
    return Score(RIGHT_ANSWER, "right")


class Reading(NamedTuple):
    """The answer of a completion in the right form, or what is wrong with its form."""

    answer: str
    problem: str = ""


def read(completion: str, *, form: Form, strict_form: bool) -> Reading:
    """Check the form and take the answer out, in time linear in the completion's length."""
    return (read_answer_tags if form == "answer_tags" else read_boxed)(completion, strict=strict_form)


def read_answer_tags(completion: str, *, strict: bool) -> Reading:
    """Exactly one think block, then exactly one answer block, neither within the other."""
    if problem := count_problem(completion, THINK, END_THINK, ANSWER, END_ANSWER):
        return Reading("", problem)
    before, _, rest = completion.partition(THINK)
    _, closed, rest = rest.partition(END_THINK)
    between, opened, rest = rest.partition(ANSWER)
    answer, ended, after = rest.partition(END_ANSWER)
    if not (closed and opened and ended):
        return Reading("", "tags out of order")
    if strict and (before + between + after).strip():
        return Reading("", "text outside the blocks")
    return Reading(answer.strip())


def read_boxed(completion: str, *, strict: bool) -> Reading:
    r"""Exactly one think block, then text of which the last \boxed{} counts."""
    if problem := count_problem(completion, THINK, END_THINK):
        return Reading("", problem)
    before, _, rest = completion.partition(THINK)
    _, closed, after = rest.partition(END_THINK)
    if not closed:
        return Reading("", "tags out of order")
    if strict and before.strip():
        return Reading("", "text before <think>")
    answer = last_boxed(after)
    if answer is None:
        return Reading("", r"no \boxed{} after </think>")
    return Reading(answer.strip())


def count_problem(completion: str, *tags: str) -> str:
    """Names the first tag that does not occur exactly once: "no </think>", "2 <answer>"; "" if all do."""
    for tag in tags:
        count = completion.count(tag)
        if count != 1:
            return f"{count or 'no'} {tag}"
    return ""
