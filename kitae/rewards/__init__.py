"""Rewards: every file here that defines `reward` is one, named by its file; `pool` scores with it in worker processes.

def reward(completion: str, *, prompt: str, answer: str | None, **columns) -> float | Score | None
"""
