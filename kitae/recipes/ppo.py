"""Proximal Policy Optimization: a critic says what each token was worth, and the policy moves a clipped step towards it.

    prompts -> rollouts -> rewards - KL -> values -> advantages, returns -> rows -> batches -> two losses -> new weights

Papers: arXiv:1707.06347 (PPO), arXiv:1506.02438 (advantages), arXiv:1909.08593 (the KL penalty), arXiv:2203.02155
(InstructGPT).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kitae.config import (
    DataSettings,
    EvalSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    RewardSettings,
    RolloutSettings,
    RunSettings,
    SaveSettings,
    Section,
    TrainSettings,
)

if TYPE_CHECKING:
    from kitae.recipes._setup import Setup


class PPORolloutSettings(RolloutSettings):
    """One sampling phase of PPO (a round)."""

    prompts_per_round: int = Field(32, ge=1)
    """Distinct prompts sampled in each round, over all ranks; more make advantages and critic less noisy."""
    num_generations: int = Field(1, ge=1)
    """Completions per prompt; the critic is the baseline, so one is enough."""
    epochs_per_round: int = Field(4, ge=1)
    """Passes over a round's rollouts; more use a round better and lean harder on the clips."""
    mask_truncated: bool = False
    """Take completions cut at max_new_tokens out of losses, advantages and KL."""


class PPOSettings(Section):
    """The objective of PPO."""

    critic: Literal["separate", "shared"] = "separate"
    """separate trains a second model; shared a value head on the policy's own layers: half the memory, but the two losses
    pull at the same weights."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the KL penalty to the reference model in each token's reward; 0 loads none."""
    target_kl: float = Field(0.0, ge=0)
    """KL to the reference, in nats per completion, that the weight is steered to from kl_coef on; 0 keeps kl_coef."""
    kl_horizon: int = Field(10_000, ge=1)
    """Completions over which the steered weight changes by at most a fifth; a larger one steers more slowly."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token; below 1 a reward at the end counts less for early tokens."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of the advantages: 1 trusts the sampled rewards (no bias, noisy), 0 the critic's next value only."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """How far the ratio to the sampling policy may fall before its gradient is cut."""
    clip_high: float = Field(0.2, gt=0)
    """How far the ratio may rise."""
    value_clip: float = Field(0.2, ge=0)
    """How far a value may move from the round's old one before its gradient is cut; 0 does not cut."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value loss beside the policy's, for a shared critic."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus; larger keeps the policy undecided for longer."""
    reward_clip: float = Field(0.0, ge=0)
    """Rewards are cut to within +- this before anything else; 0 leaves them."""
    whiten_rewards: bool = False
    """Divide the round's token rewards, KL penalty included, by their standard deviation."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken from the reward of a completion that was cut at max_new_tokens."""


class CriticSettings(Section):
    """The critic where ppo.critic is separate; it has the policy's lora, precision and optimizer settings."""

    name_or_path: str | None = None
    """A reward model or language model to start from; default: the critic/ of model.name_or_path, else that model."""
    learning_rate: float = Field(1e-5, ge=0)
    """Step size of the critic at the top of the schedule."""
    warmup_rounds: int = Field(0, ge=0)
    """First rounds in which only the critic trains, so that the policy follows no untrained critic."""


class Settings(RunSettings):
    """PPO with a critic, for rewards from functions or reward models: full, LoRA or QLoRA."""

    output_dir: str = "runs/ppo"
    """The run's folder: final model at its top, the critic in critic/, checkpoints and logs beside it."""
    loss: str = ""
    """Your own loss instead of the policy's, as file.py:function; see docs/recipes/custom-losses.md."""
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    rollout: PPORolloutSettings = PPORolloutSettings()
    reward: RewardSettings = RewardSettings()
    ppo: PPOSettings = PPOSettings()
    critic: CriticSettings = CriticSettings()
    train: TrainSettings = TrainSettings()
    optim: OptimSettings = OptimSettings(learning_rate=1e-6, beta2=0.95)
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings(metric="eval/accuracy")
    log: LogSettings = LogSettings()


def train(cfg: Settings, setup: Setup) -> None:
    """Alternate rounds of sampling with `updates_per_round x epochs_per_round` optimizer steps on each."""
    from kitae.algos import averaging, ppo
    from kitae.recipes import _ppo
    from kitae.recipes._losses import chosen_loss
    from kitae.recipes.grpo import annealed
    from kitae.train.buffer import RolloutBuffer

    rows_per_forward = cfg.rollout.rows_per_forward
    clipped = partial(ppo.policy_loss, clip_low=cfg.ppo.clip_low, clip_high=cfg.ppo.clip_high)
    policy_loss = chosen_loss(cfg.loss, default=clipped, produces=_ppo.STREAMS)
    value_loss = partial(ppo.value_loss, value_clip=cfg.ppo.value_clip)
    problems, held_out = setup.data.problems(max_prompt_length=cfg.rollout.max_prompt_length)
    loader = setup.data.loader(problems, items_per_step=cfg.rollout.prompts_per_round)
    buffer = RolloutBuffer(updates=cfg.rollout.updates_per_round, epochs=cfg.rollout.epochs_per_round)
    controller = ppo.KLController(cfg.ppo.kl_coef, target=cfg.ppo.target_kl, horizon=cfg.ppo.kl_horizon)
    setup.run.track("buffer", buffer)
    setup.run.track("kl", controller)
    total = setup.total_steps(steps_per_epoch=loader.steps_per_epoch * buffer.steps_per_round)
    warmup = _ppo.warmup_steps(cfg, total=total, steps_per_round=buffer.steps_per_round)
    judge = setup.judge(cfg.reward)
    learner, critic = _ppo.make_learners(cfg, setup, total=total, warmup=warmup)
    is_shared = critic is learner
    objective = ppo.Objective(
        policy=policy_loss,
        value=value_loss if is_shared else None,
        value_coef=cfg.ppo.value_coef,
        entropy_coef=cfg.ppo.entropy_coef,
    )
    sampler = setup.sampler(learner, cfg.rollout)
    reference = setup.reference(learner, rows_per_forward=rows_per_forward) if cfg.ppo.kl_coef else None

    for step in setup.steps(total, evaluate=setup.accuracy_evaluator(sampler, judge, held_out)):
        metrics: dict[str, float] = {}
        if buffer.is_used_up:
            # 1. Sample completions with the current policy.
            temperature = annealed(cfg.rollout, step=step, total=total)
            with setup.timer("rollout"):
                prompts, n = loader.take(), cfg.rollout.num_generations
                judging = judge.begin()
                groups = sampler.sample(
                    prompts, n=n, temperature=temperature, step=step, on_rollout=judging.see
                )

            # 2. Judge each as soon as it is there. What could not be scored, or is masked, is out of what follows.
            with setup.timer("reward"):
                scores = judging.scores(groups)
            rows = _ppo.to_rows(groups, scores, is_masking=cfg.rollout.mask_truncated, settings=cfg.ppo)

            # 3. What reference and critic say of each token, before any of them moves.
            with setup.timer("score"):
                if reference is not None:
                    rows = reference.annotate(rows, temperature=temperature)
                passes = setup.collate(_ppo.flat(rows), rows_per_forward=rows_per_forward)
                rows = _ppo.with_values(rows, passes, critic.values(passes))

            # 4. Rewards per token, advantages and returns. From here on this is ordinary training.
            rows, found = _ppo.estimate(rows, settings=cfg.ppo, controller=controller, world=setup.world)
            buffer.fill(rows, temperature=temperature)
            metrics |= setup.report_round(step, groups, scores) | {"rollout/temperature": temperature} | found
            del metrics["rollout/dead_groups"]  # a group whose rewards are equal teaches PPO as much as any

        # 5. The next slice of the round: gradient and update, of the critic alone while it warms up.
        weighed, denominator = averaging.weigh(buffer.take(), "token")
        batches = setup.collate(weighed, rows_per_forward=rows_per_forward, temperature=buffer.temperature)
        with setup.timer("update"):
            if step > warmup:
                metrics |= setup.update(learner, batches, objective, denominator=denominator)
            if not is_shared:
                on_values = ppo.Objective(value=value_loss)
                metrics |= _ppo.of_critic(setup.update(critic, batches, on_values, denominator=denominator))
        setup.run.log(step, setup.train_metrics(metrics, batches))
