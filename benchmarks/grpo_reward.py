"""The reward of grpo.py, the same for both sides: the share of words that begin with a letter before m."""

from __future__ import annotations


def share(text: str) -> float:
    spoken = text.split()
    return sum(word[0] < "m" for word in spoken) / len(spoken) if spoken else 0.0


def reward(completion: str, **_: object) -> float:
    """As kitae calls it: one completion."""
    return share(completion)


def rewards(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
    """As TRL calls it: a batch of completions, each a list with the assistant's turn."""
    return [share(turns[0]["content"]) for turns in completions]
