"""Health notes: what a run's numbers say is going wrong, each in one sentence with the setting to change.

metric lines --Watch.see--> series of the names the rules need --rules--> notes (terminal, train.log, events.jsonl)

A note is said once. It is said again after the trouble was over for a while, or when its number has doubled. Rules
look at lines as metrics.jsonl has them, so a resumed run says what an uninterrupted one says. docs/health.md lists them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Any, NamedTuple

FIRST, LAST = 20, 60
"""So many values of a metric are kept from its beginning, and from its end."""
PEAK = 5
"""A metric's peak is the highest mean of so many values in a row."""


class Note(NamedTuple):
    """What is wrong, as of which step, and the full name of the setting to change."""

    rule: str
    step: int
    sentence: str
    setting: str


class Finding(NamedTuple):
    """What a rule found: the number that must double before it is said again, and the first part of the sentence."""

    size: float
    text: str


class Series:
    """One metric: its first values, its last ones, and its highest mean of PEAK in a row."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.last: list[float] = []
        self.steps: list[int] = []
        """The steps of `last`."""
        self.count = 0
        self.peak = -math.inf

    def add(self, step: int, value: float) -> None:
        if len(self.first) < FIRST:
            self.first.append(value)
        self.last, self.steps = [*self.last, value][-LAST:], [*self.steps, step][-LAST:]
        self.count += 1
        if self.count >= PEAK:
            self.peak = max(self.peak, fmean(self.last[-PEAK:]))

    def state(self) -> dict[str, Any]:
        peak = self.peak if math.isfinite(self.peak) else None
        return {
            "first": self.first,
            "last": self.last,
            "steps": self.steps,
            "count": self.count,
            "peak": peak,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.first, self.last, self.steps = list(state["first"]), list(state["last"]), list(state["steps"])
        self.count = state["count"]
        self.peak = -math.inf if state["peak"] is None else state["peak"]


class Seen:
    """What rules look at: the series so far, the run's settings, its recipe."""

    def __init__(self, series: Mapping[str, Series], settings: Mapping[str, Any], recipe: str) -> None:
        self._series, self._settings, self.recipe = series, settings, recipe

    def count(self, name: str) -> int:
        return self._series[name].count if name in self._series else 0

    def first(self, name: str, n: int, *, skip: int = 0) -> float | None:
        """Mean of the first n values after `skip`; None where there are fewer."""
        values = self._series[name].first[skip : skip + n] if name in self._series else []
        return fmean(values) if len(values) == n else None

    def last(self, name: str, n: int) -> float | None:
        """Mean of the last n values; None where there are fewer."""
        values = self.values(name, n)
        return fmean(values) if values else None

    def values(self, name: str, n: int) -> list[float]:
        """The last n values, or none where there are fewer."""
        values = self._series[name].last[-n:] if name in self._series else []
        return values if len(values) == n else []

    def step_before(self, name: str, n: int) -> int:
        """The step of the n-th last value."""
        return self._series[name].steps[-n]

    def peak(self, name: str) -> float:
        return self._series[name].peak

    def setting(self, name: str) -> Any:
        """A setting's value by its full name; None where this run has none of that name."""
        value: Any = self._settings
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    def has_setting(self, name: str) -> bool:
        section, _, field = name.rpartition(".")
        inside = self.setting(section) if section else self._settings
        return isinstance(inside, Mapping) and field in inside

    def did_not_rise(self, name: str) -> bool:
        """Whether the last 5 values are at most a tenth of their spread above the first 10; false where that is unknown."""
        before, now = self.first(name, 10), self.last(name, 5)
        if before is None or now is None:
            return False
        return now <= before + 0.1 * math.sqrt(pvariance(self._series[name].first[:10])) + 1e-9


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


# the rules --------------------------------------------------------------------------------------------------------


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


class Watch:
    """Looks at a run's metric lines and says what is wrong. Its state belongs to a checkpoint."""

    def __init__(self, *, settings: Mapping[str, Any], recipe: str) -> None:
        """`settings` are the run's resolved settings as JSON values."""
        self._series: dict[str, Series] = {}
        self._names = {name for rule in RULES for name in rule.metrics}
        self._said: dict[str, dict[str, float]] = {}
        """Of each note that stands: its size, the lines since it was said, and those of them without a finding."""
        self._seen = Seen(self._series, settings, recipe)

    def see(self, step: int, line: Mapping[str, float | None]) -> list[Note]:
        """Take a line of metrics.jsonl, and return the notes it gives rise to. Only finite numbers are looked at."""
        fresh = {}
        for name in self._names & set(line):
            value = line[name]
            if value is not None and math.isfinite(value):
                fresh[name] = value
                self._series.setdefault(name, Series()).add(step, value)
        found = [self._look(rule, step) for rule in RULES if any(name in fresh for name in _main(rule))]
        return [note for note in found if note is not None]

    def _look(self, rule: Rule, step: int) -> Note | None:
        finding = rule.check(self._seen)
        said = self._said.get(rule.name)
        if said is not None:
            said["lines"] += 1
            said["quiet"] = said["quiet"] + 1 if finding is None else 0
            if said["quiet"] >= rule.quiet:
                del self._said[rule.name]
        has_doubled = said is None or (finding is not None and finding.size >= 2 * said["size"])
        if finding is None or not has_doubled or (said is not None and said["lines"] < rule.quiet):
            return None
        self._said[rule.name] = {"size": finding.size, "lines": 0, "quiet": 0}
        what, setting = next(
            (remedy for remedy in rule.remedies if self._seen.has_setting(remedy[1])), rule.remedies[-1]
        )
        value = self._seen.setting(setting)
        now = f" (now {value:g})" if isinstance(value, int | float) and not isinstance(value, bool) else ""
        return Note(rule.name, step, f"{finding.text}; {what} {setting}{now}", setting)

    def state(self) -> dict[str, Any]:
        series = {name: series.state() for name, series in self._series.items()}
        return {"series": series, "said": {name: dict(said) for name, said in self._said.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._series.clear()
        for name, saved in state["series"].items():
            self._series[name] = Series()
            self._series[name].load_state(saved)
        self._said = {name: dict(said) for name, said in state["said"].items()}


def _main(rule: Rule) -> tuple[str, ...]:
    """The metrics whose lines a rule looks at: its first one; for the KL whichever the recipe reports."""
    return rule.metrics if rule.check is _kl_rising else rule.metrics[:1]
