"""What PPO adds to a round: rows with their scores, a critic, and the advantages and returns that losses ask for.

rollouts, scores --to_rows--> rows --reference, critic--> streams --estimate--> advantages, returns
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kitae.algos import ppo
from kitae.config import ModelSettings
from kitae.data.collate import with_stream
from kitae.errors import ConfigError
from kitae.models import value_head
from kitae.models.critic import load_critic
from kitae.models.estimate import MOMENT_BYTES
from kitae.models.files import find_model
from kitae.models.load import load_policy, load_tokenizer
from kitae.models.policy import Policy
from kitae.models.save import save_policy
from kitae.parallel import fsdp
from kitae.parallel.world import World
from kitae.recipes._sampling import Groups, Scores
from kitae.train.learner import Learner
from kitae.types import Batch, Rollout, Row

if TYPE_CHECKING:
    from kitae.recipes._setup import Setup
    from kitae.recipes.ppo import PPOSettings, Settings

log = logging.getLogger(__name__)
STREAMS = ("advantages", "old_logprobs", "returns", "old_values")
"""What a row of a round holds for the losses."""
FOLDER = "critic"
"""Where the final critic lies below the final model, a model folder of its own (or models/value_head.py's file)."""
OF_OPTIMIZER = ("grad_norm", "learning_rate", "skipped", "loss_scale")
"""Metrics that two learners of one run both have."""


# the critic --------------------------------------------------------------------------------------------------------


def warmup_steps(cfg: Settings, *, total: int, steps_per_round: int) -> int:
    """Steps of the rounds in which only the critic trains; refused where nothing would be left for the policy."""
    steps = cfg.critic.warmup_rounds * steps_per_round
    if steps >= total:
        raise ConfigError(
            f"critic.warmup_rounds is {cfg.critic.warmup_rounds}, which at {steps_per_round} steps a round leaves the "
            f"policy none of the run's {total} steps; lower it, or raise train.max_steps"
        )
    return steps


def make_learners(cfg: Settings, setup: Setup, *, total: int, warmup: int) -> tuple[Learner, Learner]:
    """The policy's learner and the critic's: one and the same where the critic shares the policy's layers."""
    if cfg.ppo.critic == "shared":
        learner = setup.learner(total_steps=total, load=_load_with_value_head)
        setup.also_save(partial(_save_value_head, learner.policy, setup.world))
        return learner, learner
    model = setup.on_device(_critic_model(cfg))
    learner = setup.learner(total_steps=total - warmup)
    critic = _own_critic(cfg, setup, model, total=total)
    setup.also_save(partial(_save_critic, critic, setup))
    return learner, critic


def _own_critic(cfg: Settings, setup: Setup, model: ModelSettings, *, total: int) -> Learner:
    log.info("the critic starts from %s", model.name_or_path)
    critic = load_critic(
        model,
        lora=cfg.lora,
        optimizer=cfg.optim.name,
        ranks=setup.world.world_size,
        tokens_per_pass=setup.most_tokens,
    )
    fsdp.shard(critic, setup.world)
    optim = cfg.optim.model_copy(update={"learning_rate": cfg.critic.learning_rate})
    learner = Learner(critic, optim=optim, total_steps=total, world=setup.world)
    setup.run.track("critic", learner, grows_by=MOMENT_BYTES[optim.name] * learner.flat.grad.numel())
    return learner


def _critic_model(cfg: Settings) -> ModelSettings:
    """Where the critic starts: the model that was named, else the critic an earlier run left, else the policy's own."""
    if cfg.critic.name_or_path is None:
        left = _own_folder(cfg.model) / FOLDER
        is_model = any((left / name).is_file() for name in ("config.json", "adapter_config.json"))
        return cfg.model.model_copy(update={"name_or_path": str(left)}) if is_model else cfg.model
    model = cfg.model.model_copy(update={"name_or_path": cfg.critic.name_or_path, "revision": None})
    own = model.model_copy(update={"tokenizer": None})
    if load_tokenizer(own).get_vocab() != load_tokenizer(cfg.model).get_vocab():
        raise ConfigError(
            f"critic.name_or_path {cfg.critic.name_or_path} has another vocabulary than model.name_or_path "
            f"{cfg.model.name_or_path}, and would read other tokens; name a model with the same tokenizer"
        )
    return model


def _own_folder(model: ModelSettings) -> Path:
    found = find_model(model.name_or_path, revision=model.revision, with_code=model.trust_remote_code)
    return found.adapter or found.folder


def _load_with_value_head(model: ModelSettings, **how: Any) -> Policy:
    # **how: load_policy's keyword arguments.
    policy = load_policy(model, **how)
    file = value_head.attach(policy, start=_own_folder(model))
    log.info("the value head starts %s", f"from {file}" if file else "at zero")
    return policy


def _save_critic(critic: Learner, setup: Setup, folder: Path) -> None:
    tensors = critic.full_tensors()
    if setup.world.is_main:
        save_policy(
            critic.policy, folder / FOLDER, tensors=tensors, max_shard_gib=setup.cfg.save.max_shard_gib
        )
        setup.template.save(folder / FOLDER)


def _save_value_head(policy: Policy, world: World, folder: Path) -> None:
    tensors = value_head.whole_tensors(policy)
    if world.is_main:
        value_head.save(tensors, folder)


def of_critic(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of a critic's own update, under names the policy's do not have."""
    return {
        f"critic_{name}" if name in OF_OPTIMIZER else name: value
        for name, value in metrics.items()
        if name != "loss"  # value_loss says it
    }


# a round -----------------------------------------------------------------------------------------------------------


def to_rows(groups: Groups, scores: Scores, *, is_masking: bool, settings: PPOSettings) -> list[list[Row]]:
    """The completions that teach as rows, grouped alike: with the sampler's log-probs and a number `score`.

    A completion that could not be scored teaches nothing, nor does a truncated one where `is_masking`.
    """
    return [
        [
            _to_row(rollout, _shaped(score.value, rollout, settings))
            for rollout, score in zip(group, own, strict=True)
            if score.value is not None and not (is_masking and rollout.finish_reason == "length")
        ]
        for group, own in zip(groups, scores, strict=True)
    ]


def _shaped(reward: float, rollout: Rollout, settings: PPOSettings) -> float:
    if settings.reward_clip:
        reward = min(max(reward, -settings.reward_clip), settings.reward_clip)
    return reward - (settings.missing_eos_penalty if rollout.finish_reason == "length" else 0.0)


def _to_row(rollout: Rollout, score: float) -> Row:
    prompt = rollout.problem.token_ids
    return Row(
        token_ids=prompt + rollout.token_ids,
        loss_mask=[False] * len(prompt) + [True] * len(rollout.token_ids),
        prompt_length=len(prompt),
        streams={"old_logprobs": [0.0] * len(prompt) + rollout.logprobs},
        numbers={"score": score},
        kept_ids=None if rollout.kept_ids is None else [[]] * len(prompt) + rollout.kept_ids,
    )


def flat(groups: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of all groups."""
    return [row for group in groups for row in group]


def with_values(
    groups: list[list[Row]], batches: Sequence[Batch], values: Sequence[Tensor]
) -> list[list[Row]]:
    """The groups with a stream old_values; `batches` were made of their rows, and `values` are the critic's for them."""
    rows = iter(with_stream(flat(groups), "old_values", batches, values))
    return [[next(rows) for _ in group] for group in groups]


def estimate(
    groups: list[list[Row]], *, settings: PPOSettings, controller: ppo.KLController, world: World
) -> tuple[list[list[Row]], dict[str, float]]:
    """The groups with advantages and returns in place of scores, and what the round amounted to over all ranks.

    The KL weight of this round is the controller's; what the round's KL makes of it holds from the next one on.
    """
    rows = flat(groups)
    lengths_B = torch.tensor([row.num_taught for row in rows], dtype=torch.long)
    is_token_BL = torch.arange(max(lengths_B.tolist(), default=0)) < lengths_B[:, None]
    scores_B = torch.tensor([row.numbers["score"] for row in rows], dtype=torch.float64)
    values_BL = _padded(rows, "old_values", is_token_BL)
    kl_BL = torch.zeros_like(values_BL)
    if settings.kl_coef:
        kl_BL = _padded(rows, "old_logprobs", is_token_BL) - _padded(rows, "ref_logprobs", is_token_BL)

    rewards_BL = ppo.token_rewards(scores_B, kl_BL, lengths_B, kl_coef=controller.coef)
    if settings.whiten_rewards:
        white_BL = ppo.whiten(rewards_BL, _moments(rewards_BL[is_token_BL], world), keep_mean=True)
        rewards_BL = torch.where(is_token_BL, white_BL, 0.0)
    advantages_BL = ppo.gae(rewards_BL, values_BL, gamma=settings.gamma, lam=settings.lam)
    returns_BL = advantages_BL + values_BL
    errors, returns, values = (
        _moments(numbers_BL[is_token_BL], world) for numbers_BL in (advantages_BL, returns_BL, values_BL)
    )
    white_BL = ppo.whiten(advantages_BL, errors)

    metrics = {"rollout/value_mean": _mean(values), "rollout/return_mean": _mean(returns)}
    if ppo.variance(returns) > 0:  # returns - values are the advantages
        metrics["train/explained_variance"] = 1.0 - ppo.variance(errors) / ppo.variance(returns)
    if settings.kl_coef:
        kl = _moments(kl_BL.sum(1), world)
        metrics |= {"rollout/kl": _mean(kl), "train/kl_coef": controller.coef}
        controller.update(_mean(kl), completions=float(kl[0]))
    done = iter(
        [
            _finished(row, advantages=white_L, returns=returns_L)
            for row, white_L, returns_L in zip(rows, white_BL.tolist(), returns_BL.tolist(), strict=True)
        ]
    )
    return [[next(done) for _ in group] for group in groups], metrics


def _finished(row: Row, *, advantages: list[float], returns: list[float]) -> Row:
    """The row with STREAMS alone, filled with zeros over its prompt."""
    blank, n = [0.0] * row.prompt_length, row.num_taught
    kept = {name: row.streams[name] for name in STREAMS if name in row.streams}
    streams = {**kept, "advantages": blank + advantages[:n], "returns": blank + returns[:n]}
    return replace(row, streams=streams, numbers={})


def _padded(rows: Sequence[Row], stream: str, is_token_BL: Tensor) -> Tensor:
    """A stream of the completions' tokens [B, L] in float64, filled up with zeros."""
    padded_BL = torch.zeros(is_token_BL.shape, dtype=torch.float64)
    numbers = [number for row in rows for number in row.streams[stream][row.prompt_length :]]
    padded_BL[is_token_BL] = torch.tensor(numbers, dtype=torch.float64)
    return padded_BL


def _moments(numbers: Tensor, world: World) -> Tensor:
    return world.sum(ppo.moments(numbers).to(world.device)).cpu()


def _mean(totals: Tensor) -> float:
    count, total, _ = totals.tolist()
    return total / count if count else 0.0
