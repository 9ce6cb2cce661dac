"""The reasoning reward: 0 for a wrong form, 1 for the right form with a wrong answer, 10 for both right.

The form is `<think>…</think><answer>…</answer>`, or with form="boxed" `<think>…</think>` and a last `\\boxed{…}`.
Rule rewards as in arXiv:2501.12948, section 2.2.2.
"""

from __future__ import annotations

from typing import Literal

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
    problem = (answer_tags_problem if form == "answer_tags" else boxed_problem)(
        completion, strict=strict_form
    )
    if problem:
        return Score(WRONG_FORM, problem)
    found = text_in_answer(completion) if form == "answer_tags" else text_in_boxed(completion)
    if len(found) > MAX_ANSWER:
        return Score(RIGHT_FORM, f"wrong: answer of {len(found)} characters, at most {MAX_ANSWER} are read")
    if not equivalent(found, answer):
        return Score(RIGHT_FORM, f"wrong: {found[:100]}, expected {answer[:100]}")
    return Score(RIGHT_ANSWER, "right")


def form_problem(completion: str, *, form: Form, strict_form: bool) -> str:
    """What is wrong with the completion's form, "" if nothing is; in time linear in its length."""
    check = answer_tags_problem if form == "answer_tags" else boxed_problem
    return check(completion, strict=strict_form)


def answer_tags_problem(completion: str, *, strict: bool) -> str:
    """What keeps `completion` from being one think block and then one answer block; "" if nothing does."""
    tags = (THINK, END_THINK, ANSWER, END_ANSWER)
    if problem := count_problem(completion, tags):
        return problem
    starts = [completion.index(tag) for tag in tags]
    if starts != sorted(starts):
        return "tags out of order"
    before, rest = completion.split(THINK)
    between, after = rest.split(END_THINK)[1].split(ANSWER)
    outside = (before, between, after.split(END_ANSWER)[1])
    if strict and any(text.strip() for text in outside):
        return "text outside the blocks"
    return ""


def boxed_problem(completion: str, *, strict: bool) -> str:
    """What keeps `completion` from being one think block and then text with a `\\boxed{}`; "" if nothing does."""
    if problem := count_problem(completion, (THINK, END_THINK)):
        return problem
    if completion.index(END_THINK) < completion.index(THINK):
        return "tags out of order"
    if strict and completion.split(THINK)[0].strip():
        return "text before <think>"
    if last_boxed(completion.split(END_THINK)[1]) is None:
        return "no \\boxed{} after </think>"
    return ""


def count_problem(completion: str, tags: tuple[str, ...]) -> str:
    for tag in tags:
        count = completion.count(tag)
        if count != 1:
            return f"{count} {tag}" if count else f"no {tag}"
    return ""


def text_in_answer(completion: str) -> str:
    return completion.split(ANSWER)[1].split(END_ANSWER)[0].strip()


def text_in_boxed(completion: str) -> str:
    return (last_boxed(completion.split(END_THINK)[1]) or "").strip()
