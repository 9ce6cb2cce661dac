"""Rewards by path and in weighted sums: reward models score as in training, and each reward stays visible by itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

import kitae
from kitae.config import DataSettings, ModelSettings, RewardSettings
from kitae.data.chat import Template
from kitae.errors import ConfigError, ModelError
from kitae.models.critic import load_critic
from kitae.models.load import load_tokenizer
from kitae.models.save import save_policy
from kitae.models.toy import make_model, make_tokenizer
from kitae.parallel.world import World
from kitae.recipes._judging import Judge
from kitae.recipes._rewards import (
    RewardModel,
    Rewards,
    Weighed,
    open_rewards,
    part_means,
    short_names,
)
from kitae.recipes._summary import sample_records, summarise
from kitae.rewards.pool import RewardPool
from kitae.settings import resolve
from kitae.train.difficulty import Difficulty
from kitae.types import Problem, Rollout, Score

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]
LETTERS = """
def short(completion, *, prompt, answer):
    return -float(len(completion))


def only_even(completion, *, prompt, answer):
    return None if len(completion) % 2 else 1.0
"""


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A function prefill -> folder of a reward model with a random head, as kitae saves one."""
    made = {}

    def make(prefill="", **sizes):
        key = (prefill, *sizes.items())
        if key not in made:
            base, folder = (tmp_path_factory.mktemp(name) for name in ("base", "rm"))
            make_model(base, "llama", tokenizer=make_tokenizer(prefill=prefill), **sizes)
            model = ModelSettings(name_or_path=str(base), device="cpu", dtype="float32")
            critic = load_critic(model)
            with torch.no_grad():
                critic.causal_lm.score.weight.normal_(generator=torch.Generator().manual_seed(1))
            save_policy(critic, folder)
            Template.load(load_tokenizer(model), data=DataSettings()).save(folder)
            made[key] = folder
        return made[key]

    return make


def problem(prompt="3+4", *, answer="7", turns=None, **columns):
    messages = turns or [{"role": "user", "content": prompt}]
    return Problem(prompt=prompt, token_ids=[5, 6], answer=answer, messages=messages, columns=columns)


def rollout(text, asked, *, finish_reason="stop"):
    return Rollout(
        problem=asked, text=text, token_ids=[7] * len(text), logprobs=[-1.0] * len(text), finish_reason=finish_reason
    )  # fmt: skip


def plain_score(folder, text):
    """transformers' own score of a text that is laid out already."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    with torch.no_grad():
        return plain(input_ids=torch.tensor([ids])).logits[0, 0].item()


def load(folder):
    return RewardModel.load(str(folder), device="cpu", dtype="float32")


# a reward model -----------------------------------------------------------------------------------------------------


def test_a_reward_model_scores_the_conversation_in_its_own_template_up_to_the_end_token(reward_model):
    folder = reward_model()
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "3+4"},
    ]
    items = [
        ("7", problem()),
        ("<think>x</think>7", problem()),
        ("so 7", problem(turns=turns)),
        ("", problem()),
    ]
    found = [score.value for score in load(folder).score(items)]
    question = "<|im_start|>user\n3+4<|im_end|>\n<|im_start|>assistant\n"
    before = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    expected = [
        plain_score(folder, f"{question}7<|im_end|>"),
        plain_score(folder, f"{question}<think>x</think>7<|im_end|>"),
        plain_score(folder, f"{before}{question}so 7<|im_end|>"),
        plain_score(folder, f"{question}<|im_end|>"),
    ]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len({round(value, 4) for value in found}) == 4


def test_a_prefilled_think_is_rendered_as_in_training_and_a_broken_form_is_scored_too(reward_model):
    folder = reward_model("<think>\n")
    asked = "<|im_start|>user\n3+4<|im_end|>\n<|im_start|>assistant\n<think>\n"
    items = [(text, problem()) for text in ("<think>\nso</think>7", "<think>\nnever closed", "7")]
    found = [score.value for score in load(folder).score(items)]
    expected = [
        plain_score(folder, f"{asked}so</think>7<|im_end|>"),
        plain_score(folder, f"{asked}never closed<|im_end|>"),
        plain_score(
            folder, f"{asked}\n</think>\n\n7<|im_end|>"
        ),  # what training makes of an answer without thinking
    ]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_neither_neighbours_nor_order_change_a_score(reward_model):
    model = load(reward_model())
    items = [(str(n) * (n % 7 + 1), problem(f"{n % 5}+{n}")) for n in range(100)]
    together = [score.value for score in model.score(items)]
    assert [score.value for score in model.score(items[::-1])][::-1] == pytest.approx(together, abs=1e-5)
    assert [model.score([item])[0].value for item in items[:3]] == pytest.approx(together[:3], abs=1e-5)


def test_what_is_longer_than_the_reward_model_reads_could_not_be_scored(reward_model):
    model = load(reward_model("", max_position_embeddings=40))
    short, long = model.score([("7", problem()), ("7" * 40, problem())])
    assert short.value is not None
    assert long.value is None and long.reason == "50 tokens, and the reward model reads 40"


def test_a_score_that_is_no_number_could_not_be_scored(reward_model):
    model = load(reward_model())
    with torch.no_grad():
        model._critic.causal_lm.score.weight.fill_(math.nan)
    assert model.score([("7", problem())]) == [Score(None, "its score is nan")]


def test_a_language_model_is_no_reward(tiny):
    with pytest.raises(
        ConfigError, match=r"reward\.function names .* a language model without a score; make a"
    ):
        open_rewards(RewardSettings(function=str(tiny())), device="cpu")
    extra = {str(tiny()): 1.0}
    with pytest.raises(ConfigError, match=r"reward\.extra names"):
        open_rewards(RewardSettings(function="format", extra=extra), device="cpu")


def test_a_folder_that_is_not_there_is_named_with_its_setting(tmp_path):
    with pytest.raises(ModelError, match=r"reward\.extra: .*nowhere/rm"):
        open_rewards(RewardSettings(function="format", extra={"./nowhere/rm": 1.0}, num_workers=1))


def test_no_scores_of_no_completions(reward_model):
    assert load(reward_model()).score([]) == []
    with open_rewards(RewardSettings(function=str(reward_model())), device="cpu") as rewards:
        assert rewards.score([]) == [] and rewards.compare([]) == []


# several rewards ----------------------------------------------------------------------------------------------------


class Fixed:
    """A reward with given scores, in order."""

    def __init__(self, *values):
        self.values, self.is_closed = values, False

    def score(self, items):
        return [Score(value, f"said {value}") for value, _ in zip(self.values, items, strict=True)]

    def close(self):
        self.is_closed = True


def weighed(**parts):
    rewards = [Weighed(name=name, weight=weight, reward=one) for name, (weight, one) in parts.items()]
    return Rewards(rewards, settings=RewardSettings())


def test_the_total_is_the_weighted_sum_and_none_of_any_makes_it_unscored():
    rewards = weighed(main=(2.0, Fixed(1.0, 10.0, None)), other=(-0.5, Fixed(4.0, None, 1.0)))
    first, second, third = rewards.score([("x", problem())] * 3)
    assert (first, first.parts) == (Score(0.0, "said 1.0"), {"main": 1.0, "other": 4.0})
    assert (second, second.parts) == (Score(None, "other: said None"), {"main": 10.0, "other": None})
    assert (third, third.parts) == (Score(None, "main: said None"), {"main": None, "other": 1.0})
    assert [score.main for score in (first, second, third)] == [1.0, 10.0, None]
    assert Score(3.0).main == 3.0


def test_each_reward_has_its_own_mean_over_what_it_could_score():
    rewards = weighed(main=(1.0, Fixed(1.0, 3.0, None)), other=(0.0, Fixed(5.0, None, 1.0)))
    scores = [rewards.score([("x", problem())] * 3)]
    assert part_means(scores, world=World()) == {"reward/main": 2.0, "reward/other": 3.0}
    assert part_means([[Score(1.0)]], world=World()) == {}


def test_form_and_accuracy_are_of_the_main_rewards_own_value():
    """The reasoning reward says 10, 1, 0, and 10; the sum is far from these, and one of them has none."""
    rewards = weighed(reasoning=(0.1, Fixed(10.0, 1.0, 0.0, 10.0)), other=(100.0, Fixed(1.0, 0.0, 1.0, None)))
    groups = [[rollout("ab", problem())] * 4]
    scores = Judge(rewards).score(groups)
    found = summarise(groups, scores, world=World(), is_reasoning=True)
    assert found["format_rate"] == 0.75 and found["accuracy"] == 0.5
    assert found["unscored"] == 0.25
    assert found["reward"] == pytest.approx((101.0 + 0.1 + 100.0) / 3)
    records = sample_records(groups, scores)
    assert records[0]["rewards"] == {"reasoning": 10.0, "other": 1.0} and records[0]["reward"] == 101.0
    assert "rewards" not in sample_records(groups, [[Score(1.0)] * 4])[0]
    difficulty = Difficulty(right_from=10.0)
    difficulty.see(1, records)
    assert difficulty.of(0).right == 1 and difficulty.of(0).scored == 3


def test_names_are_short_and_different():
    names = ["math", "mine.py:short", "yours.py:short", "runs/rm", "pkg.mod:math", "Skywork/Reward-V2"]
    assert short_names(names) == ["math", "short", "short_2", "rm", "math_2", "Reward-V2"]


def test_functions_and_reward_models_are_weighed_together(reward_model, tmp_path):
    (tmp_path / "letters.py").write_text(LETTERS)
    settings = RewardSettings(
        function="math",
        weight=3.0,
        extra={f"{tmp_path}/letters.py:short": 0.5, str(reward_model()): 2.0},
        num_workers=1,
        timeout_s=20,
    )
    with open_rewards(settings, device="cpu", dtype="float32") as rewards:
        [score] = rewards.score([("it is 7", problem())])
        assert rewards.compare([("7", "7.0"), ("7", "8")]) == [Score(1.0), Score(0.0)]
    [of_model] = load(reward_model()).score([("it is 7", problem())])
    assert score.value == pytest.approx(3.0 - 3.5 + 2.0 * of_model.value, rel=1e-5)
    assert list(score.parts) == ["math", "short", reward_model().name]
    assert score.reason.startswith("right")


def test_one_function_alone_is_its_pool_as_before():
    with open_rewards(RewardSettings(num_workers=1, timeout_s=20)) as rewards:
        assert isinstance(rewards, RewardPool)


def test_a_reward_model_alone_still_counts_right_answers(reward_model):
    settings = RewardSettings(function=str(reward_model()), num_workers=1, timeout_s=20)
    with open_rewards(settings, device="cpu", dtype="float32") as rewards:
        groups = [[rollout("\\boxed{7}", problem()), rollout("\\boxed{8}", problem())]]
        assert Judge(rewards).num_right(groups) == 1


def test_what_was_opened_is_closed_when_another_reward_fails(monkeypatch):
    closed = []
    monkeypatch.setattr(RewardPool, "close", lambda self: closed.append(self.settings.function))
    with pytest.raises(ConfigError, match="no such file"):
        open_rewards(RewardSettings(function="format", extra={"nowhere.py:f": 1.0}, num_workers=1))
    assert "format" in closed


# settings -----------------------------------------------------------------------------------------------------------


def test_weights_from_flags_from_a_file_and_from_python(tmp_path):
    cfg = resolve(
        "grpo", [*NEEDED, "--reward.extra", "repetition=0.2", "runs/rm=-1", "--reward.weight", "2"]
    )[0]
    assert cfg.reward.extra == {"repetition": 0.2, "runs/rm": -1.0} and cfg.reward.weight == 2.0
    file = tmp_path / "run.toml"
    file.write_text(
        '[model]\nname_or_path = "m"\n[data]\ntrain = ["d"]\n[reward.extra]\n"my.py:f" = 0.5\nformat = 1\n'
    )
    assert resolve("grpo", [str(file)])[0].reward.extra == {"my.py:f": 0.5, "format": 1.0}
    given = {"model_name_or_path": "m", "data.train": "d", "reward": {"extra": {"format": 1}}}
    assert resolve("grpo", given)[0].reward.extra == {"format": 1.0}
    for wrong in ("format", "format=much"):
        with pytest.raises(ConfigError, match=r"reward\.extra"):
            resolve("grpo", [*NEEDED, "--reward.extra", wrong])


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_flags_of_other_programs_name_several_rewards(recipe):
    cfg = resolve(
        recipe, [*NEEDED, "--reward_funcs", "math", "format", "runs/rm", "--reward_weights", "1", "0.5", "2"]
    )[0]
    assert (cfg.reward.function, cfg.reward.weight) == ("math", 1.0)
    assert cfg.reward.extra == {"format": 0.5, "runs/rm": 2.0}
    cfg = resolve(recipe, [*NEEDED, "--reward_functions", "math_competition_reward_fn", "gsm8k_reward_fn"])[0]
    assert cfg.reward.function == "reasoning" and cfg.reward.extra == {}
    assert resolve(recipe, [*NEEDED, "--reward_model_path", "runs/rm"])[0].reward.function == "runs/rm"
    with pytest.raises(ConfigError, match="2 weights and --reward_funcs 1 names"):
        resolve(recipe, [*NEEDED, "--reward_funcs", "math", "--reward_weights", "1", "2"])
    with pytest.raises(ConfigError, match="weighs nothing"):
        resolve(recipe, [*NEEDED, "--reward_weights", "1"])
    with pytest.raises(ConfigError, match=r"reward\.extra names math, which is reward\.function"):
        resolve(recipe, [*NEEDED, "--reward.function", "math", "--reward.extra", "math=1"])


# a run --------------------------------------------------------------------------------------------------------------


def test_grpo_with_a_reward_model_and_a_function_logs_each_and_evaluates(reward_model, tiny, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(8)))
    out = kitae.train(
        "grpo",
        {
            "model_name_or_path": str(tiny()), "data.train": str(data), "output_dir": str(tmp_path / "run"),
            "reward.function": str(reward_model()), "reward.extra": {"repetition": 0.5}, "reward.num_workers": 1,
            "reward.timeout_s": 20, "prompts_per_round": 2, "num_generations": 3, "max_new_tokens": 6, "max_steps": 2,
            "eval.steps": 1, "eval.max_rows": 2, "num_threads": 1, "report_to": "none", "dtype": "float32",
        },
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    name = reward_model().name
    for line in lines:
        parts = line[f"rollout/reward/{name}"] + 0.5 * line["rollout/reward/repetition"]
        assert line["rollout/reward"] == pytest.approx(parts, rel=1e-5)
        assert "rollout/format_rate" not in line and "eval/reward" in line
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    record = samples[0] if "rewards" in samples[0] else samples[0]["samples"][0]
    assert set(record["rewards"]) == {name, "repetition"}
    assert record["reward"] == pytest.approx(record["rewards"][name] + 0.5 * record["rewards"]["repetition"])


def test_two_ranks_with_a_reward_model_each_equal_one_process(reward_model, tiny, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(8)))
    common = [
        "train", "grpo", "--model_name_or_path", str(tiny("llama")), "--data.train", str(data), "--dtype", "float32",
        "--reward.function", str(reward_model()), "--reward.extra", "repetition=0.5", "--reward.num_workers", "1",
        "--reward.timeout_s", "60", "--prompts_per_round", "3", "--num_generations", "2", "--max_new_tokens", "6",
        "--max_steps", "2", "--report_to", "none", "--train.num_threads", "1",
    ]  # fmt: skip
    found = []
    for name, launch in (("one", []), ("two", ["launch", "--nproc_per_node", "2"])):
        program = [sys.executable, "-m", "kitae", *launch, *common, "--output_dir", str(tmp_path / name)]
        done = subprocess.run(program, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append([{k: v for k, v in line.items() if k.startswith("rollout/reward")} for line in lines])
    for one, two in zip(*found, strict=True):
        assert len(one) == 4 and two == pytest.approx(one, rel=1e-4, abs=1e-6)
