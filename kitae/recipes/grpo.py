"""Group Relative Policy Optimization: sample a group of completions per prompt, reinforce the better ones.

    prompts -> rollouts -> rewards -> advantages -> rows -> batches -> loss -> gradient -> new weights

Papers: arXiv:2402.03300 (GRPO), arXiv:2501.12948 (rule rewards), arXiv:2503.14476 (DAPO), arXiv:2503.20783
(Dr. GRPO). Other variants are settings too; what they do lies in recipes/_variants.py and recipes/_prompts.py.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kitae.config import (
    DataSettings,
    EvalSettings,
    GroupRolloutSettings,
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
    from torch import Tensor

    from kitae.recipes._sampling import Groups, Scores
    from kitae.recipes._setup import Setup
    from kitae.types import Problem, Rollout, Row, Score


class GRPOSettings(Section):
    """The objective of GRPO."""

    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 KL penalty to the reference model; 0 loads none."""
    ref_refresh_rounds: int = Field(0, ge=0)
    """Every so many rounds the reference becomes the policy as it then is; 0 keeps the run's start."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """How far the ratio to the sampling policy may fall before its gradient is cut."""
    clip_high: float = Field(0.2, ge=0)
    """How far the ratio may rise; larger than clip_low explores more (DAPO)."""
    average: Literal["token", "sequence", "constant"] = "token"
    """What a step averages over: tokens (DAPO), completions (GRPO as published), or a constant (Dr. GRPO)."""
    advantage: Literal["group", "rloo", "reinforce++"] = "group"
    """The baseline: the group's mean, the mean of the others in the group (RLOO), or the group's mean, normalised over the
    round (REINFORCE++)."""
    scale_by_std: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group's rewards, of the round's (batch), or not (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Compare policies token by token, or by the mean over a completion (GSPO; clip_low and clip_high are then tiny)."""
    objective: Literal["clip", "cispo"] = "clip"
    """clip cuts the gradient of a ratio out of bounds; cispo keeps every token's and bounds its weight by 1 + clip_high."""
    dual_clip: float = Field(0.0, ge=0)
    """Largest ratio with which a worse completion is pushed down; 0 sets no bound, 3 is usual."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of a bonus for the entropy of each token's distribution; more explores longer."""
    is_cap: float = Field(0.0, ge=0)
    """Largest weight that corrects for a sampler computing otherwise than the learner, which then scores each round itself;
    0 takes the sampler's log-probs as they are, 2 is usual."""


class Settings(RunSettings):
    """GRPO with verifiable rewards: full, LoRA or QLoRA."""

    output_dir: str = "runs/grpo"
    """The run's folder: final model at its top, checkpoints and logs beside it."""
    loss: str = ""
    """Your own loss instead, as file.py:function; see docs/recipes/custom-losses.md."""
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    rollout: GroupRolloutSettings = GroupRolloutSettings()
    reward: RewardSettings = RewardSettings()
    grpo: GRPOSettings = GRPOSettings()
    train: TrainSettings = TrainSettings()
    optim: OptimSettings = OptimSettings(learning_rate=1e-6, beta2=0.95)
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings(metric="eval/accuracy")
    log: LogSettings = LogSettings()


def train(cfg: Settings, setup: Setup) -> None:
    """Alternate rounds of sampling with `updates_per_round x epochs_per_round` optimizer steps on each."""
    from kitae.algos import averaging
    from kitae.recipes import _variants as variants
    from kitae.recipes._ahead import open_ahead
    from kitae.recipes._losses import chosen_loss
    from kitae.recipes._sampling import rewards_of
    from kitae.train.buffer import RolloutBuffer

    grpo, rollout = cfg.grpo, cfg.rollout
    n, rows_per_forward = rollout.num_generations, rollout.rows_per_forward
    loss_fn = chosen_loss(cfg.loss, default=variants.loss_of(grpo), produces=variants.streams_of(grpo))
    problems, held_out = setup.data.problems(max_prompt_length=rollout.max_prompt_length)
    prompts = setup.data.prompts(problems, rollout=rollout)
    buffer = RolloutBuffer(updates=rollout.updates_per_round, epochs=rollout.epochs_per_round)
    setup.run.track("buffer", buffer)
    total = setup.total_steps(steps_per_epoch=prompts.rounds_per_epoch * buffer.steps_per_round)
    judge = setup.judge(cfg.reward)
    learner = setup.learner(total_steps=total, load=variants.loading_of(grpo))
    sampler = setup.sampler(learner, rollout)
    reference, own = variants.scorers_of(grpo, setup, learner, rows_per_forward=rows_per_forward)
    temperature_at = partial(annealed, rollout, total=total)
    ahead = open_ahead(setup, prompts, problems, sampler, judge, temperature_at=temperature_at, total=total)
    keeps_dead = bool(grpo.kl_coef or grpo.entropy_coef or cfg.loss)

    def attempt(problems: list[Problem], *, step: int) -> tuple[Groups, Scores]:
        # 1. Sample G completions of each prompt with the current policy,
        judging = judge.begin()
        with setup.timer("rollout"):
            groups = sampler.sample(
                problems, n=n, temperature=temperature_at(step), step=step, on_rollout=judging.see
            )

        # 2. and judge each as soon as it is there. NaN marks a completion that could not be scored.
        with setup.timer("reward"):
            return groups, judging.scores(groups)

    for step in setup.steps(total, evaluate=setup.accuracy_evaluator(sampler, judge, held_out)):
        metrics: dict[str, float] = {}
        if buffer.is_used_up:
            temperature = temperature_at(step)
            sampled = prompts.round(partial(attempt, step=step)) if ahead is None else ahead.round(step)
            metrics |= setup.report_round(step, *sampled.everything) | sampled.metrics
            metrics["rollout/temperature"] = temperature
            groups, scores = sampled.groups, sampled.scores
            rewards_PG = rewards_of(scores, num_generations=n)
            rewards_PG, found = variants.shaped(rewards_PG, groups, rollout, world=setup.world)
            metrics |= found

            # 3. A group whose rewards are all equal has advantage 0 everywhere: it teaches nothing.
            advantages_PG = variants.advantages_of(rewards_PG, grpo, world=setup.world)

            # 4. Lay prompt and completion out as rows. From here on this is ordinary training.
            rows = [
                to_rows(group, own_scores, advantages_G=advantages_G, rollout=rollout)
                for group, own_scores, advantages_G in zip(groups, scores, advantages_PG, strict=True)
            ]
            if reference is not None:
                variants.refresh_if_due(reference, grpo, step=step, steps_per_round=buffer.steps_per_round)
                rows = reference.annotate(rows, temperature=temperature)
            if own is not None:
                rows, found = own.annotate(rows, temperature=temperature)
                metrics |= found
            buffer.fill(rows, temperature=temperature)

        # 5. The denominator is fixed before dead groups leave; with another term than the advantage's they stay.
        weighed, denominator = averaging.weigh(buffer.take(), grpo.average, max_tokens=rollout.max_new_tokens)
        teaching = [row for row in weighed if teaches(row, keeps_dead=keeps_dead)]
        batches = setup.collate(teaching, rows_per_forward=rows_per_forward, temperature=buffer.temperature)

        # 6. Gradient, then update.
        with setup.timer("update"):
            metrics |= setup.update(learner, batches, loss_fn, denominator=denominator)
        setup.run.log(step, setup.train_metrics(metrics, batches))


def annealed(rollout: RolloutSettings, step: int, *, total: int) -> float:
    """Temperature of the round that starts at `step`: linear from the first round's to the last round's."""
    per_round = rollout.updates_per_round * rollout.epochs_per_round
    rounds, this = -(-total // per_round), (step - 1) // per_round
    final = rollout.initial_temperature if rollout.final_temperature is None else rollout.final_temperature
    share = this / max(rounds - 1, 1)
    return rollout.initial_temperature * (1 - share) + final * share


def to_rows(
    group: list[Rollout], scores: list[Score], *, advantages_G: Tensor, rollout: RolloutSettings
) -> list[Row]:
    """One group as training rows. Streams are 0 on the prompt, where nothing is taught.

    A completion that could not be scored teaches nothing, nor does a truncated one under mask_truncated.
    """
    from kitae.types import Row

    rows = []
    for completion, score, advantage in zip(group, scores, advantages_G.tolist(), strict=True):
        prompt = completion.problem.token_ids
        blank = [0.0] * len(prompt)
        is_masked = rollout.mask_truncated and completion.finish_reason == "length"
        is_taught = score.value is not None and not is_masked
        rows.append(
            Row(
                token_ids=prompt + completion.token_ids,
                loss_mask=[False] * len(prompt) + [is_taught] * len(completion.token_ids),
                prompt_length=len(prompt),
                streams={
                    "advantages": blank + [advantage] * len(completion.token_ids),
                    "old_logprobs": blank + completion.logprobs,
                },
                kept_ids=None if completion.kept_ids is None else [[]] * len(prompt) + completion.kept_ids,
            )
        )
    return rows


def teaches(row: Row, *, keeps_dead: bool) -> bool:
    """Whether a row can have a gradient: rows without advantage only do through another term, such as the KL."""
    return row.num_taught > 0 and (keeps_dead or any(row.streams["advantages"]))
