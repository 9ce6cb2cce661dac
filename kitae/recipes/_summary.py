"""What a round of sampling amounted to: numbers for metrics.jsonl, records for samples.jsonl."""

from __future__ import annotations

import math
from typing import Any

import torch

from kitae.algos.advantages import is_dead
from kitae.parallel.world import World
from kitae.recipes._sampling import Groups, Scores, rewards_of
from kitae.rewards import reasoning
from kitae.rewards.pool import EXHAUSTED
from kitae.types import WeighedScore


def summarise(groups: Groups, scores: Scores, *, world: World, is_reasoning: bool) -> dict[str, float]:
    """What the rollouts of all ranks amounted to, as means; the same on every rank.

    format_rate and accuracy are only known for the reasoning reward, whose own values say both.
    """
    flat = [
        (r, s) for group, own in zip(groups, scores, strict=True) for r, s in zip(group, own, strict=True)
    ]
    values = [s.value for _, s in flat if s.value is not None]
    own = [s.main for _, s in flat if s.main is not None]
    dead = is_dead(rewards_of(scores, num_generations=len(groups[0]))) if groups else torch.zeros(0)
    counts = {
        "completions": len(flat),
        "scored": len(values),
        "groups": len(groups),
        "tokens": sum(len(r.token_ids) for r, _ in flat),
        "reward": sum(values),
        "squared": sum(v * v for v in values),
        "judged": len(own),
        "right_form": sum(v >= reasoning.RIGHT_FORM for v in own),
        "right": sum(v == reasoning.RIGHT_ANSWER for v in own),
        "truncated": sum(r.finish_reason == "length" for r, _ in flat),
        "timeouts": sum(s.reason in EXHAUSTED for _, s in flat),
        "dead": int(dead.sum()),
        "surprise": -sum(sum(r.logprobs) for r, _ in flat),
    }
    totals = world.sum(torch.tensor(list(counts.values()), dtype=torch.float64, device=world.device)).tolist()
    n = dict(zip(counts, totals, strict=True))
    completions, scored = max(n["completions"], 1), max(n["scored"], 1)
    mean = n["reward"] / scored
    found = {
        "reward": mean,
        "reward_std": math.sqrt(max(n["squared"] / scored - mean * mean, 0.0)),
        "completion_length": n["tokens"] / completions,
        "truncated": n["truncated"] / completions,
        "unscored": 1 - n["scored"] / completions,
        "timeouts": n["timeouts"] / completions,
        "dead_groups": n["dead"] / max(n["groups"], 1),
        "entropy": n["surprise"] / max(n["tokens"], 1),
    }
    if is_reasoning:
        judged = max(n["judged"], 1)
        found |= {"format_rate": n["right_form"] / judged, "accuracy": n["right"] / judged}
    return found


def sample_records(groups: Groups, scores: Scores) -> list[dict[str, Any]]:
    """One JSON record per completion, for samples.jsonl."""
    return [
        {
            "problem": r.problem.index,
            "sample": number,
            "prompt": r.problem.prompt,
            "completion": r.text,
            "answer": r.problem.answer,
            "reward": s.value,
            "reason": s.reason,
            **({"rewards": s.parts} if isinstance(s, WeighedScore) else {}),
            "tokens": len(r.token_ids),
            "finish_reason": r.finish_reason,
        }
        for group, own in zip(groups, scores, strict=True)
        for number, (r, s) in enumerate(zip(group, own, strict=True))
    ]
