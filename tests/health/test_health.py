"""Every health note is said on a log that shows its trouble, and none on logs of runs that went well."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest

from kitae.config import as_json
from kitae.health import Watch
from kitae.health.rules import RULES
from kitae.plugins import names_in
from kitae.settings import settings_class
from kitae.settings.fields import settings_of

HERE = Path(__file__).parent


def settings_for(recipe):
    return as_json(settings_class(recipe).model_validate({"model": {"name_or_path": "m"}}))


def notes_on(lines, *, recipe="grpo", settings=None):
    watch = Watch(settings=settings or settings_for(recipe), recipe=recipe)
    return [note for step, line in enumerate(lines, 1) for note in watch.see(step, line)]


def lines_of(count, **shapes):
    """Lines of metrics: each shape is a function of the line's number (from 0) or a constant; `_` stands for the slash."""
    return [
        {name.replace("_", "/", 1): shape(i) if callable(shape) else shape for name, shape in shapes.items()}
        for i in range(count)
    ]


def noisy(shape, *, by, seed=0):
    rng = random.Random(seed)
    return lambda i: shape(i) + rng.gauss(0, by)


REWARD = {"rollout_reward": 2.0, "rollout_reward_std": 1.0}
PICTURES = {
    "dead_groups": ("grpo", lines_of(6, rollout_dead_groups=0.9), "rollout.refill", "90% of the prompts"),
    "all_truncated": ("grpo", lines_of(4, rollout_truncated=0.99), "rollout.max_new_tokens", "99% of the completions"),
    "unscored": ("ppo", lines_of(3, rollout_unscored=0.6), "reward.function", "60% of the completions"),
    "format_plateau": (
        "grpo",
        lines_of(25, rollout_format_rate=0.97, rollout_accuracy=0.01, rollout_reward=1.06, rollout_reward_std=1.0),
        "data.train",
        "97% of the completions had the right form and only 1.0%",
    ),
    "reward_falling": (
        "grpo",
        lines_of(30, rollout_reward=lambda i: 6.0 if i < 10 else 6.0 - 0.3 * (i - 10), rollout_reward_std=2.0),
        "optim.learning_rate",
        "was 6 at its best",
    ),
    "kl_rising": ("grpo", lines_of(40, train_kl=lambda i: 0.03 if i < 20 else 0.03 * 1.3 ** (i - 20)),
                  "grpo.kl_coef", "ten times the 0.03"),
    "clip_share": ("grpo", lines_of(12, train_clip_fraction=0.3), "optim.learning_rate", "30% of the tokens"),
    "entropy_collapse": (
        "grpo",
        lines_of(40, rollout_entropy=lambda i: 0.8 * 0.8**i, **REWARD),
        "grpo.entropy_coef",
        "rollout/entropy fell from",
    ),
    "length_explosion": (
        "grpo",
        lines_of(30, rollout_completion_length=lambda i: 100 * 1.05**i, **REWARD),
        "rollout.overlong_buffer",
        "completions grew from 126 to",
    ),
    "length_collapse": (
        "grpo",
        lines_of(40, rollout_completion_length=lambda i: 300 * 0.93**i, **REWARD),
        "optim.learning_rate",
        "completions shrank from 221 to",
    ),
    "eval_loss_rising": (
        "sft",
        lines_of(6, eval_loss=lambda i: [1.3, 1.1, 1.2, 1.25, 1.31, 1.4][i]),
        "train.early_stopping_patience",
        "rose 3 times in a row, from 1.1 at step 2 to 1.31",
    ),
    "no_learning_rate": ("sft", lines_of(2, train_learning_rate=0.0), "optim.learning_rate", "0 from the first step on"),
    "chosen_falling": (
        "dpo",
        lines_of(40, train_chosen_logprob=noisy(lambda i: -1.0 - 0.02 * i, by=0.05),
                 train_rejected_logprob=-1.5, train_margin=lambda i: 0.01 * i),
        "dpo.nll_coef",
        "log-prob per token of the chosen completions fell from",
    ),
    "margin_by_falling": (
        "dpo",
        lines_of(40, train_chosen_logprob=lambda i: -1.0 - 0.02 * i,
                 train_rejected_logprob=lambda i: -1.2 - 0.05 * i, train_margin=lambda i: 0.03 * i),
        "dpo.nll_coef",
        "while both log-probs fell",
    ),
    "gradient_exploding": ("sft", lines_of(40, train_grad_norm=lambda i: 0.3 if i < 30 else 6.0),
                           "optim.learning_rate", "and was 0.3"),
    "always_clipped": ("sft", lines_of(55, train_grad_norm=12.0), "optim.max_grad_norm", "above 1 in all"),
    "useless_critic": ("ppo", lines_of(22, train_explained_variance=-0.4), "critic.learning_rate", "is -0.40"),
}  # fmt: skip


def test_every_rule_has_its_picture():
    assert list(PICTURES) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", PICTURES)
def test_a_note_is_said_on_the_picture_of_its_trouble(name):
    recipe, lines, setting, words = PICTURES[name]
    notes = notes_on(lines, recipe=recipe)
    assert notes, "nothing was said"
    assert {note.rule for note in notes} == {name}
    first = notes[0]
    assert (first.rule, first.setting) == (name, setting)
    assert words in first.sentence and setting in first.sentence
    assert "\n" not in first.sentence and not first.sentence.endswith("."), "one sentence, as log lines are"
    assert any(digit in first.sentence for digit in "0123456789")


HEALTHY = {
    "sft": lines_of(
        200, train_loss=lambda i: 2 * 0.98**i, train_grad_norm=noisy(lambda i: 1.5, by=0.3),
        train_learning_rate=lambda i: 1e-4 * (1 - i / 200),
    ) + lines_of(8, eval_loss=lambda i: [2.0, 1.6, 1.5, 1.52, 1.49, 1.5, 1.51, 1.47][i]),
    "grpo": lines_of(
        100, rollout_reward=noisy(lambda i: 1 + i * 0.05, by=0.3), rollout_reward_std=3.0,
        rollout_dead_groups=lambda i: 0.2 + 0.004 * i, rollout_truncated=0.03, rollout_accuracy=lambda i: 0.05 + 0.004 * i,
        rollout_format_rate=0.95, rollout_entropy=lambda i: 0.6 - 0.004 * i, train_kl=lambda i: 0.0008 * i,
        rollout_completion_length=lambda i: 200 + 3 * i, train_clip_fraction=noisy(lambda i: 0.03, by=0.01),
        train_grad_norm=noisy(lambda i: 0.2, by=0.03), train_learning_rate=1e-6,
    ),
    "dpo": lines_of(
        200, train_margin=noisy(lambda i: 0.01 * i, by=0.2), train_chosen_logprob=noisy(lambda i: -1.0, by=0.15),
        train_rejected_logprob=noisy(lambda i: -1.2 - 0.002 * i, by=0.15), train_grad_norm=noisy(lambda i: 3.0, by=1.0),
        train_learning_rate=lambda i: 5e-7 * min(1, (i + 1) / 20),
    ),
    "ppo": lines_of(
        100, train_explained_variance=lambda i: -0.5 + 0.1 * i if i < 10 else 0.5, rollout_kl=lambda i: 0.05 * i,
        rollout_reward=lambda i: 1 + 0.02 * i, rollout_reward_std=1.0, train_clip_fraction=0.12,
    ),
    "distill": lines_of(100, rollout_completion_length=lambda i: 50 + 5 * i, train_divergence=lambda i: 1 / (i + 1)),
    "kto": lines_of(100, train_kl=lambda i: 0.05 * i, train_chosen_logprob=-1.0, train_rejected_logprob=-1.1),
}  # fmt: skip


@pytest.mark.parametrize("recipe", HEALTHY)
def test_nothing_is_said_of_a_run_that_goes_well(recipe):
    assert notes_on(HEALTHY[recipe], recipe=recipe) == []


def real(name):
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


def test_nothing_is_said_of_the_quickstart_and_the_trouble_is_named_where_its_rate_is_ten_times_too_high():
    """Two real runs of the quickstart's second stage, at learning rates 1e-4 and 1e-3."""
    assert notes_on(real("learns")) == []
    notes = notes_on(real("collapses"))
    assert [(note.step, note.rule) for note in notes] == [
        (15, "reward_falling"),
        (33, "dead_groups"),
        (33, "format_plateau"),
    ]
    assert notes[0].setting == "optim.learning_rate"


def test_a_note_is_said_once_and_again_when_the_trouble_comes_back():
    bad, good = {"rollout/truncated": 1.0}, {"rollout/truncated": 0.0}
    assert [n.step for n in notes_on([bad] * 100)] == [3]
    assert [n.step for n in notes_on([bad] * 5 + [good] * 10 + [bad] * 5)] == [3, 18]
    assert [n.step for n in notes_on([bad] * 5 + [good] * 1 + [bad] * 5)] == [3], "it was not over yet"


def test_a_note_is_said_again_when_its_number_has_doubled():
    lines = lines_of(60, train_kl=lambda i: 0.03 if i < 20 else 0.03 * 1.2 ** (i - 20))
    notes = notes_on(lines)
    values = [float(note.sentence.split(" is ")[1].split(",")[0]) for note in notes]
    assert len(values) > 2
    assert all(b.step - a.step >= 10 for a, b in itertools.pairwise(notes)), "and not at every line"
    assert all(b >= 1.99 * a for a, b in itertools.pairwise(values))


def test_a_watch_goes_on_from_its_state_as_if_never_interrupted():
    lines = real("collapses")
    whole = notes_on(lines)
    settings = settings_for("grpo")
    for cut in (0, 1, 14, 15, 32, 33, 50):
        first = Watch(settings=settings, recipe="grpo")
        said = [n for step, line in enumerate(lines[:cut], 1) for n in first.see(step, line)]
        second = Watch(settings=settings, recipe="grpo")
        second.load_state(json.loads(json.dumps(first.state())))
        said += [n for step, line in enumerate(lines[cut:], cut + 1) for n in second.see(step, line)]
        assert said == whole


def test_numbers_that_are_not_finite_are_passed_over():
    lines = [{"rollout/truncated": v} for v in (1.0, None, math.nan, 1.0, math.inf, 1.0)]
    assert [n.step for n in notes_on(lines)] == [6]


def test_the_setting_named_is_one_the_recipe_has():
    everywhere = {
        name for recipe in names_in("kitae.recipes") for name in settings_of(settings_class(recipe))
    }
    for rule in RULES:
        assert {setting for _, setting in rule.remedies} <= everywhere, rule.name
    note, _ = notes_on(lines_of(40, train_kl=lambda i: 0.03 if i < 20 else 3.0), recipe="sft")
    assert note.setting == "optim.learning_rate"
    assert note.sentence.endswith("lower optim.learning_rate (now 2e-05)")


def test_gspos_clips_are_no_news():
    settings = settings_for("grpo")
    settings["grpo"]["ratio"] = "sequence"
    assert notes_on(lines_of(20, train_clip_fraction=0.4), settings=settings) == []
