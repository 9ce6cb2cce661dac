"""What goes wrong in runs, one rule each: a function of the series, what to do, and why it matters (docs/health.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import NamedTuple

from kitae.health.series import FIRST, LAST, PEAK, Seen


class Finding(NamedTuple):
    """What a rule found: the number that must double before it is said again, and the first part of the sentence."""

    size: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that goes wrong. It is looked at on every line that has its first metric."""

    name: str
    metrics: tuple[str, ...]
    check: Callable[[Seen], Finding | None]
    remedies: tuple[tuple[str, str], ...]
    """(what to do, full name of the setting); the first that this run has is named."""
    meaning: str
    """For docs/health.md: when it is said, and why that matters."""
    quiet: int = 10
    """So many lines without a finding, and the trouble is over; and so many between a note and its repetition."""


def _dead_groups(seen: Seen) -> Finding | None:
    share = seen.last("rollout/dead_groups", 5)
    if share is None or share <= 0.8:
        return None
    accuracy = seen.last("rollout/accuracy", 5)
    why = ""
    if accuracy is not None:
        level = "easy" if accuracy >= 0.5 else "hard"
        why = f" (accuracy {accuracy:.0%}: the problems are too {level} for the model as it is now)"
    text = f"{share:.0%} of the prompts of the last 5 rounds taught nothing, as all completions of each earned the same"
    return Finding(share, text + why)


def _all_truncated(seen: Seen) -> Finding | None:
    share = seen.last("rollout/truncated", 3)
    if share is None or share < 0.95:
        return None
    return Finding(share, f"{share:.0%} of the completions of the last 3 rounds were cut before they ended")


def _unscored(seen: Seen) -> Finding | None:
    share = seen.last("rollout/unscored", 3)
    if share is None or share < 0.5:
        return None
    text = f"{share:.0%} of the completions of the last 3 rounds could not be scored"
    return Finding(share, f"{text} (samples.jsonl says why) and taught nothing")


def _format_plateau(seen: Seen) -> Finding | None:
    form, reward = seen.last("rollout/format_rate", 20), seen.last("rollout/reward", 20)
    right = seen.values("rollout/accuracy", 20)
    if form is None or reward is None or not right or form < 0.9 or not 0.8 <= reward <= 1.5:
        return None
    if fmean(right) >= 0.05 or fmean(right[10:]) - fmean(right[:10]) >= 0.01:
        return None
    text = f"for 20 rounds {form:.0%} of the completions had the right form and only {fmean(right):.1%} the right answer"
    return Finding(1.0, f"{text}, so the model is paid for the form alone")


def _reward_falling(seen: Seen) -> Finding | None:
    now = seen.last("rollout/reward", PEAK)
    if now is None or seen.count("rollout/reward") < 3 * PEAK:
        return None
    peak, spread = seen.peak("rollout/reward"), seen.last("rollout/reward_std", PEAK) or 0.0
    noise = spread * math.sqrt(2 / (PEAK * max(seen.setting("rollout.prompts_per_round") or 1, 1)))
    if peak <= 0 or now > 0.6 * peak or peak - now <= 3 * noise:
        return None
    return Finding(
        peak - now, f"the mean reward of {PEAK} rounds was {peak:.3g} at its best and is {now:.3g} now"
    )


def _kl_rising(seen: Seen) -> Finding | None:
    name = "train/kl" if seen.count("train/kl") else "rollout/kl"
    start, now = seen.first(name, 10, skip=10), seen.last(name, 5)
    if start is None or now is None:
        return None
    # Of a whole completion (PPO, KTO) the KL is larger than of a token. Below these it is small whatever its rise.
    floor = 1.0 if name == "rollout/kl" or seen.recipe == "kto" else 0.02
    if now < 10 * max(start, floor):
        return None
    text = f"{name} is {now:.3g}, more than ten times the {start:.3g} near its start"
    return Finding(now, f"{text}: the policy is far from the reference model")


def _clip_share(seen: Seen) -> Finding | None:
    share = seen.last("train/clip_fraction", 10)
    is_sequence = seen.setting("grpo.ratio") == "sequence"  # its clips are tiny, and cut many by design
    if share is None or share <= 0.2 or is_sequence:
        return None
    return Finding(share, f"{share:.0%} of the tokens of the last 10 lines lost their gradient to the clip")


def _entropy_collapse(seen: Seen) -> Finding | None:
    start, now = seen.first("rollout/entropy", 5), seen.last("rollout/entropy", 5)
    rewards = seen.values("rollout/reward", 20)
    if start is None or now is None or not rewards or now > 0.1 * start:
        return None
    gain = fmean(rewards[10:]) - fmean(rewards[:10])
    accuracy = seen.last("rollout/accuracy", 5)
    if gain > 0.01 * abs(fmean(rewards[:10])) or (accuracy is not None and accuracy >= 0.9):
        return None
    text = (
        f"rollout/entropy fell from {start:.3g} to {now:.3g} nats, and for 20 rounds the reward has not risen"
    )
    return Finding(start / max(now, 1e-9), f"{text}: the policy no longer tries anything new")


def _length_explosion(seen: Seen) -> Finding | None:
    name = "rollout/completion_length"
    start, now = seen.first(name, 10), seen.last(name, 5)
    if start is None or now is None or seen.count(name) < 15 or now < 2 * start:
        return None
    if not seen.did_not_rise("rollout/reward"):
        return None
    return Finding(
        now / start, f"completions grew from {start:.0f} to {now:.0f} tokens and the reward did not"
    )


def _length_collapse(seen: Seen) -> Finding | None:
    name = "rollout/completion_length"
    start, now = seen.first(name, 10), seen.last(name, 5)
    if start is None or now is None or seen.count(name) < 15 or now > start / 3:
        return None
    if not seen.did_not_rise("rollout/reward"):
        return None
    text = f"completions shrank from {start:.0f} to {now:.1f} tokens and the reward did not rise"
    return Finding(start / max(now, 1.0), text)


def _eval_loss_rising(seen: Seen) -> Finding | None:
    values = seen.values("eval/loss", min(seen.count("eval/loss"), LAST))
    rises = 0
    while rises + 1 < len(values) and values[-1 - rises] > values[-2 - rises]:
        rises += 1
    if rises < 3:
        return None
    since = seen.step_before("eval/loss", rises + 1)
    text = f"eval/loss rose {rises} times in a row, from {values[-1 - rises]:.4g} at step {since} to {values[-1]:.4g}"
    return Finding(rises, f"{text}: what is learned now does not hold for new rows")


def _no_learning_rate(seen: Seen) -> Finding | None:
    # A warm-up has no step of rate 0, and a schedule that ends at 0 did not begin there.
    name = "train/learning_rate"
    count = seen.count(name)
    if seen.first(name, min(count, FIRST)) != 0 or seen.last(name, min(count, LAST)) != 0:
        return None
    return Finding(1.0, "train/learning_rate has been 0 from the first step on, so no weight changes")


def _thirds(values: list[float]) -> tuple[float, float, float, float]:
    """Means of three parts of 30 values, and what a difference of two of them is by chance (one standard deviation)."""
    parts = [values[i : i + 10] for i in (0, 10, 20)]
    a, b, c = map(fmean, parts)
    return a, b, c, math.sqrt(fmean(map(pvariance, parts)) * 2 / 10)


def _falls(values: list[float]) -> bool:
    """Whether 30 values fall from third to third, by more than chance and than 2 %."""
    if not values:
        return False
    a, b, c, chance = _thirds(values)
    return a > b > c and a - c > max(3 * chance, 0.02 * abs(a))


def _chosen_falling(seen: Seen) -> Finding | None:
    chosen = seen.values("train/chosen_logprob", 30)
    if not _falls(chosen) or _both_fall(seen):
        return None
    a, _, c, _ = _thirds(chosen)
    text = f"the log-prob per token of the chosen completions fell from {a:.3g} to {c:.3g} over the last 30 lines"
    return Finding(abs(c), f"{text}: the model unlearns what it should prefer")


def _both_fall(seen: Seen) -> bool:
    margin = seen.values("train/margin", 30)
    chosen, rejected = seen.values("train/chosen_logprob", 30), seen.values("train/rejected_logprob", 30)
    return bool(margin) and _falls([-v for v in margin]) and _falls(chosen) and _falls(rejected)


def _margin_by_falling(seen: Seen) -> Finding | None:
    if not _both_fall(seen):
        return None
    a, _, c, _ = _thirds(seen.values("train/chosen_logprob", 30))
    low, _, high, _ = _thirds(seen.values("train/margin", 30))
    text = f"the margin grew from {low:.3g} to {high:.3g} while both log-probs fell (chosen: {a:.3g} to {c:.3g} per token)"
    return Finding(abs(c), f"{text}, so probability moves to texts that nobody has judged")


def _gradient_exploding(seen: Seen) -> Finding | None:
    start, now = seen.first("train/grad_norm", FIRST), seen.last("train/grad_norm", 5)
    if (
        start is None
        or now is None
        or seen.count("train/grad_norm") < FIRST + 5
        or now < 10 * max(start, 1e-3)
    ):
        return None
    return Finding(now, f"train/grad_norm is {now:.3g}, and was {start:.3g} over the first {FIRST} lines")


def _always_clipped(seen: Seen) -> Finding | None:
    limit, norms = seen.setting("optim.max_grad_norm"), seen.values("train/grad_norm", 50)
    if not limit or not norms or min(norms) <= limit or fmean(norms) < 10 * limit:
        return None
    text = f"train/grad_norm was above {limit:g} in all of the last 50 lines, {fmean(norms):.3g} on average"
    return Finding(fmean(norms), f"{text}, so the clip sets the size of every step")


def _useless_critic(seen: Seen) -> Finding | None:
    explained = seen.last("train/explained_variance", 20)
    if explained is None or explained >= 0:
        return None
    text = f"train/explained_variance is {explained:.2f} over the last 20 rounds"
    return Finding(
        1 - explained, f"{text}: the critic's values are worse than their mean, and advantages are noise"
    )


LOWER_RATE = ("lower", "optim.learning_rate")
RULES: tuple[Rule, ...] = (
    Rule(
        name="dead_groups",
        metrics=("rollout/dead_groups", "rollout/accuracy"),
        check=_dead_groups,
        remedies=(
            ("raise", "rollout.refill"),
            ("take problems of another difficulty into", "data.train"),
        ),
        meaning="Over 5 rounds, more than 80 % of the prompts had completions of equal reward only. Their advantages are 0, "
        "so most of the sampling is for nothing.",
    ),
    Rule(
        name="all_truncated",
        metrics=("rollout/truncated",),
        check=_all_truncated,
        remedies=(("raise", "rollout.max_new_tokens"),),
        meaning="Over the last 3 rounds, at least 95 % of the completions were cut at the longest length. A cut answer is "
        "judged as it stands, which is mostly wrong.",
    ),
    Rule(
        name="unscored",
        metrics=("rollout/unscored",),
        check=_unscored,
        remedies=(("mend the function or the gold answers of", "reward.function"),),
        meaning="Over the last 3 rounds, at least half of the completions could not be scored: a function that raised, a "
        "gold answer that cannot be compared, a text too long for the reward model. Nothing is learnt from them.",
    ),
    Rule(
        name="format_plateau",
        metrics=("rollout/format_rate", "rollout/accuracy", "rollout/reward"),
        check=_format_plateau,
        remedies=(("take easier problems into (or train by SFT on worked ones first)", "data.train"),),
        meaning="For 20 rounds the form was right in at least 90 % of the completions, the answer in less than 5 %, and did "
        "not become better: reward 1 of the reasoning reward, and no way to 10.",
    ),
    Rule(
        name="reward_falling",
        metrics=("rollout/reward", "rollout/reward_std"),
        check=_reward_falling,
        remedies=(LOWER_RATE,),
        meaning="The mean reward of 5 rounds has fallen to 60 % of its best or less, by more than chance. Training has "
        "broken something; an earlier checkpoint is better than this model.",
    ),
    Rule(
        name="kl_rising",
        metrics=("train/kl", "rollout/kl"),
        check=_kl_rising,
        remedies=(("raise", "grpo.kl_coef"), ("raise", "ppo.kl_coef"), ("raise", "kto.beta"), LOWER_RATE),
        meaning="The KL divergence to the reference model is ten times that of lines 10 to 20 of the run. Far from its "
        "reference, a policy forgets what no reward asks for.",
    ),
    Rule(
        name="clip_share",
        metrics=("train/clip_fraction",),
        check=_clip_share,
        remedies=(LOWER_RATE,),
        meaning="Over 10 lines, more than 20 % of the tokens were out of the clip's bounds (not said of GRPO's sequence "
        "ratio, whose bounds are tiny): the steps are too large, or `rollout.epochs_per_round` is.",
    ),
    Rule(
        name="entropy_collapse",
        metrics=("rollout/entropy", "rollout/reward", "rollout/accuracy"),
        check=_entropy_collapse,
        remedies=(
            ("raise", "grpo.entropy_coef"),
            ("raise", "ppo.entropy_coef"),
            ("raise", "rollout.initial_temperature"),
        ),
        meaning="Entropy is down to a tenth of its start, and the reward has not risen for 20 rounds (not said above 90 % "
        "accuracy, where certainty is earned). All completions of a prompt become the same.",
    ),
    Rule(
        name="length_explosion",
        metrics=("rollout/completion_length", "rollout/reward"),
        check=_length_explosion,
        remedies=(
            ("raise", "rollout.overlong_buffer"),
            ("lower", "rollout.max_new_tokens"),
        ),
        meaning="Completions are twice as long as in the first 10 rounds and earn no more. Growing thinking is welcome only "
        "where the reward grows too.",
    ),
    Rule(
        name="length_collapse",
        metrics=("rollout/completion_length", "rollout/reward"),
        check=_length_collapse,
        remedies=(LOWER_RATE,),
        meaning="Completions are a third as long as in the first 10 rounds and earn no more: the model no longer thinks.",
    ),
    Rule(
        name="eval_loss_rising",
        metrics=("eval/loss",),
        check=_eval_loss_rising,
        remedies=(("set", "train.early_stopping_patience"), LOWER_RATE),
        meaning="Three evaluations in a row were each worse than the one before: over-fitting, or a step size too large.",
        quiet=1,
    ),
    Rule(
        name="no_learning_rate",
        metrics=("train/learning_rate",),
        check=_no_learning_rate,
        remedies=(("raise", "optim.learning_rate"),),
        meaning="The learning rate is 0 from the first step on. The run would cost time and change nothing.",
    ),
    Rule(
        name="chosen_falling",
        metrics=("train/chosen_logprob", "train/rejected_logprob", "train/margin"),
        check=_chosen_falling,
        remedies=(
            ("raise", "dpo.nll_coef"),
            ("raise", "simpo.nll_coef"),
            ("raise", "kto.desirable_weight"),
            LOWER_RATE,
        ),
        meaning="Over 30 lines, the log-prob per token of the chosen completions fell steadily, by more than chance and "
        "2 %. The model unlearns what it should prefer.",
    ),
    Rule(
        name="margin_by_falling",
        metrics=("train/margin", "train/chosen_logprob", "train/rejected_logprob"),
        check=_margin_by_falling,
        remedies=(("raise", "dpo.nll_coef"), ("raise", "simpo.nll_coef"), ("raise", "kto.beta"), LOWER_RATE),
        meaning="The margin grows only because the rejected completions become unlikely faster than the chosen ones. The "
        "probability goes to texts nobody has judged.",
    ),
    Rule(
        name="gradient_exploding",
        metrics=("train/grad_norm",),
        check=_gradient_exploding,
        remedies=(LOWER_RATE,),
        meaning="The gradient before clipping is ten times as long as over the first 20 lines.",
    ),
    Rule(
        name="always_clipped",
        metrics=("train/grad_norm",),
        check=_always_clipped,
        remedies=(("raise", "optim.max_grad_norm"),),
        meaning="Each of 50 lines had a gradient above `optim.max_grad_norm`, ten times as long on average: all steps are "
        "of one length, whatever the data says.",
    ),
    Rule(
        name="useless_critic",
        metrics=("train/explained_variance",),
        check=_useless_critic,
        remedies=(("raise", "critic.learning_rate"), LOWER_RATE),
        meaning="PPO: over 20 rounds the critic's values predict the returns worse than their mean would.",
    ),
)


def main_metrics(rule: Rule) -> tuple[str, ...]:
    """The metrics whose lines a rule looks at: its first one; for the KL whichever the recipe reports."""
    return rule.metrics if rule.check is _kl_rising else rule.metrics[:1]
