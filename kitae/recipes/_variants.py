"""What GRPO's optional settings do around its loop; the defaults are plain GRPO.

The formulas are in algos/surrogates.py, algos/baselines.py and algos/overlong.py, the explanations in docs/recipes/grpo.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kitae.algos import baselines, kl, losses, overlong, surrogates
from kitae.config import GroupRolloutSettings
from kitae.models import frozen
from kitae.models.load import load_policy
from kitae.models.policy import Policy
from kitae.parallel.world import World
from kitae.recipes._reference import Reference
from kitae.recipes._sampling import Groups
from kitae.train.learner import Learner
from kitae.types import Batch, Row

if TYPE_CHECKING:
    from kitae.algos.losses import LossFn
    from kitae.recipes._setup import Setup
    from kitae.recipes.grpo import GRPOSettings


def loss_of(grpo: GRPOSettings) -> LossFn:
    """The objective the settings describe; plain GRPO's is losses.clipped_policy_gradient."""
    is_plain = grpo.objective == "clip" and grpo.ratio == "token"
    if is_plain and not (grpo.dual_clip or grpo.entropy_coef or grpo.is_cap):
        return partial(
            losses.clipped_policy_gradient,
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            kl_coef=grpo.kl_coef,
        )
    loss = partial(
        surrogates.policy_gradient,
        clip_low=grpo.clip_low,
        clip_high=grpo.clip_high,
        kl_coef=grpo.kl_coef,
        objective=grpo.objective,
        ratio=grpo.ratio,
        dual_clip=grpo.dual_clip,
        entropy_coef=grpo.entropy_coef,
        is_cap=grpo.is_cap,
    )
    loss.needs_entropy = grpo.entropy_coef > 0  # type: ignore[attr-defined]  # read by the Learner
    return loss


def streams_of(grpo: GRPOSettings) -> list[str]:
    """What a loss can ask for by name in this run."""
    optional = {"ref_logprobs": grpo.kl_coef, "sampler_logprobs": grpo.is_cap}
    return ["advantages", "old_logprobs", *(name for name, is_on in optional.items() if is_on)]


def advantages_of(rewards_PG: Tensor, grpo: GRPOSettings, *, world: World) -> Tensor:
    """Advantages [P, G] of this rank's groups under grpo.advantage and grpo.scale_by_std; every rank calls this."""

    def sum_over_ranks(values: Tensor) -> Tensor:
        return world.sum(values.to(world.device)).cpu()

    return baselines.estimate(
        rewards_PG, baseline=grpo.advantage, scale=grpo.scale_by_std, sum_over_ranks=sum_over_ranks
    )


def shaped(
    rewards_PG: Tensor, groups: Groups, rollout: GroupRolloutSettings, *, world: World
) -> tuple[Tensor, dict[str, float]]:
    """Rewards less what completions lose for their length, and the mean of that over all ranks' completions."""
    if not rollout.overlong_buffer:
        return rewards_PG, {}
    lengths = [len(r.token_ids) for group in groups for r in group]
    penalties_PG = rollout.overlong_factor * overlong.soft_penalty(
        torch.tensor(lengths).view(rewards_PG.shape),
        longest=rollout.max_new_tokens,
        buffer=rollout.overlong_buffer,
    )
    counts = torch.tensor([float(penalties_PG.double().sum()), len(lengths)], dtype=torch.float64)
    total, count = world.sum(counts.to(world.device)).tolist()
    return rewards_PG + penalties_PG, {"rollout/overlong_penalty": total / max(count, 1)}


def loading_of(grpo: GRPOSettings) -> Callable[..., Policy]:
    """How the policy is loaded: with a frozen copy of its adapter inside, where the reference will be refreshed."""
    return frozen.load_keeping_start if grpo.ref_refresh_rounds else load_policy


def scorers_of(
    grpo: GRPOSettings, setup: Setup, learner: Learner, *, rows_per_forward: int
) -> tuple[Reference | None, OwnLogprobs | None]:
    """The reference of a KL term, and the learner itself where grpo.is_cap compares it with the sampler."""
    reference = own = None
    if grpo.kl_coef:
        is_renewed = grpo.ref_refresh_rounds > 0
        reference = setup.reference(learner, rows_per_forward=rows_per_forward, is_renewed=is_renewed)
    if grpo.is_cap:
        lay_out = partial(setup.collate, rows_per_forward=rows_per_forward)
        own = OwnLogprobs(learner, collate=lay_out, cap=grpo.is_cap)
    return reference, own


def refresh_if_due(reference: Reference, grpo: GRPOSettings, *, step: int, steps_per_round: int) -> None:
    """Let the reference be the policy as it is now, every grpo.ref_refresh_rounds rounds but the first."""
    this, every = (step - 1) // steps_per_round, grpo.ref_refresh_rounds
    if every > 0 and this > 0 and this % every == 0:
        reference.renew()


class OwnLogprobs:
    """Scores a round with the learner as it is before the round's first update, for grpo.is_cap."""

    def __init__(self, learner: Learner, *, collate: Callable[..., list[Batch]], cap: float) -> None:
        self._scorer = Reference(learner, collate=collate, stream="old_logprobs")
        self._world, self._cap = learner.world, cap

    def annotate(
        self, groups: list[list[Row]], *, temperature: float
    ) -> tuple[list[list[Row]], dict[str, float]]:
        """The learner's log-probs as old_logprobs; the sampler's, which the rows come with, become sampler_logprobs.

        The metrics say how far the two are apart, as means over the round's taught tokens of all ranks.
        """
        for group in groups:
            for row in group:
                row.streams["sampler_logprobs"] = row.streams.pop("old_logprobs")
        groups = self._scorer.annotate(groups, temperature=temperature)
        old, sampler = _taught(groups, "old_logprobs"), _taught(groups, "sampler_logprobs")
        uncapped = surrogates.truncated_weights(old, sampler, cap=math.inf)
        found = {
            "rollout/is_weight": uncapped.clamp(max=self._cap),
            "rollout/is_capped": (uncapped > self._cap).double(),
            "rollout/sampler_kl": kl.k3(sampler, old),
            "rollout/sampler_gap": (old - sampler).abs(),
        }
        sums = torch.tensor([*(float(x.sum()) for x in found.values()), len(old)], dtype=torch.float64)
        *totals, count = self._world.sum(sums.to(self._world.device)).tolist()
        return groups, {name: total / max(count, 1) for name, total in zip(found, totals, strict=True)}


def _taught(groups: list[list[Row]], stream: str) -> Tensor:
    """A stream's numbers of all taught tokens."""
    numbers = [
        number
        for group in groups
        for row in group
        for number, is_taught in zip(row.streams[stream], row.loss_mask, strict=True)
        if is_taught
    ]
    return torch.tensor(numbers, dtype=torch.float64)
