"""The form alone: 1 for `<think>…</think><answer>…</answer>` (or the boxed form), 0 for anything else.

For data without gold answers, or to teach the form before the answers count.
"""

from __future__ import annotations

from kitae.rewards.reasoning import Form, read
from kitae.types import Score


def reward(
    completion: str,
    *,
    prompt: str,
    answer: str | None,
    form: Form = "answer_tags",
    strict_form: bool = True,
    **columns: object,
) -> Score:
    """Judge the form as the reward `reasoning` does, and never the answer."""
    _, problem = read(completion, form=form, strict_form=strict_form)
    return Score(0.0, problem) if problem else Score(1.0, "right form")
