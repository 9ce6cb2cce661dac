"""What GRPO's optional settings do around its loop; with the defaults none of this is called but loss_of.

The formulas are in algos/surrogates.py, algos/baselines.py and algos/overlong.py, the explanations in docs/recipes/grpo.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kitae.algos import baselines, losses, overlong, surrogates
from kitae.config import GroupRolloutSettings
from kitae.parallel.world import World
from kitae.recipes._sampling import Groups
from kitae.types import Row

if TYPE_CHECKING:
    from kitae.algos.losses import LossFn
    from kitae.recipes._sampling import Reference
    from kitae.recipes.grpo import GRPOSettings


def loss_of(grpo: GRPOSettings) -> LossFn:
    """The objective the settings describe; plain GRPO's is losses.clipped_policy_gradient."""
    plain = {"clip_low": grpo.clip_low, "clip_high": grpo.clip_high, "kl_coef": grpo.kl_coef}
    is_plain = grpo.objective == "clip" and grpo.ratio == "token"
    if is_plain and not (grpo.dual_clip or grpo.entropy_coef or grpo.is_cap):
        return partial(losses.clipped_policy_gradient, **plain)
    loss = partial(
        surrogates.policy_gradient,
        **plain,
        objective=grpo.objective,
        ratio=grpo.ratio,
        dual_clip=grpo.dual_clip,
        entropy_coef=grpo.entropy_coef,
        is_cap=grpo.is_cap,
    )
    loss.needs_entropy = grpo.entropy_coef > 0  # type: ignore[attr-defined]  # read by the Learner
    return loss


def advantages_of(rewards_PG: Tensor, grpo: GRPOSettings, *, world: World) -> Tensor:
    """Advantages [P, G] of this rank's groups under grpo.advantage and grpo.scale_by_std; every rank calls this."""

    def sum_over_ranks(values: Tensor) -> Tensor:
        return world.sum(values.to(world.device)).cpu()

    return baselines.estimate(
        rewards_PG, baseline=grpo.advantage, scale=grpo.scale_by_std, sum_over_ranks=sum_over_ranks
    )


def overlong_penalties(
    groups: Groups, rollout: GroupRolloutSettings, *, world: World
) -> tuple[Tensor, dict[str, float]]:
    """What each completion loses for its length [P, G], at most 0, and the mean over all ranks' completions."""
    lengths_PG = torch.tensor([[len(r.token_ids) for r in group] for group in groups])
    lengths_PG = lengths_PG.view(len(groups), rollout.num_generations)
    penalties_PG = rollout.overlong_factor * overlong.soft_penalty(
        lengths_PG, longest=rollout.max_new_tokens, buffer=rollout.overlong_buffer
    )
    counts = torch.tensor([float(penalties_PG.double().sum()), penalties_PG.numel()], dtype=torch.float64)
    total, count = world.sum(counts.to(world.device)).tolist()
    return penalties_PG, {"rollout/overlong_penalty": total / max(count, 1)}


def with_own_logprobs(
    groups: list[list[Row]], own: Reference, *, temperature: float
) -> list[list[Row]]:
    """The learner's log-probs as old_logprobs; the sampler's, which the rows come with, become sampler_logprobs.

    `own` scores with the learner as it is before the round's first update, into the stream old_logprobs.
    """
    for group in groups:
        for row in group:
            row.streams["sampler_logprobs"] = row.streams.pop("old_logprobs")
    return own.annotate(groups, temperature=temperature)


