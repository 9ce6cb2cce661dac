"""Judging while others are sampled, and rounds sampled while the one before trains: neither changes a number by chance."""

import json
import random
import threading
from concurrent.futures import CancelledError, Future

import pytest

from kitae.config import ModelSettings, RewardSettings, SamplingSettings
from kitae.errors import CheckpointError, RewardError
from kitae.models.load import load_policy
from kitae.recipes import _ahead, grpo
from kitae.recipes._judging import Judge
from kitae.recipes._rewards import Rewards, Weighed
from kitae.recipes._run import run_recipe
from kitae.rewards.pool import RewardPool
from kitae.rollout.background import BackgroundEngine
from kitae.rollout.generic import GenericEngine
from kitae.rollout.native import NativeEngine
from kitae.types import Problem, Rollout, Score

VARIED = (
    "def reward(completion, *, prompt, answer, **columns):\n    return float(sum(map(ord, completion)) % 7)\n"
)
PICKY = (
    "def reward(completion, *, prompt, answer, **columns):\n"
    "    if completion.startswith('bad'):\n"
    "        raise ValueError('no ' + completion)\n"
    "    return float(len(completion))\n"
)
VOLATILE = ("time", "perf/")
PATIENCE_S = 30.0


def rollouts(*texts):
    problem = Problem(prompt="1+1", token_ids=[1], answer="2")
    return [Rollout(problem=problem, text=text, token_ids=[1], logprobs=[0.0]) for text in texts]


def pool(tmp_path, text, **settings):
    (tmp_path / "own.py").write_text(text)
    named = {"function": f"{tmp_path}/own.py:reward", "num_workers": 2, "timeout_s": 20, **settings}
    return RewardPool(RewardSettings(**named))


def seen(judge, groups, *, order):
    judging = judge.begin()
    places = [(place, sample) for place, group in enumerate(groups) for sample in range(len(group))]
    for place, sample in sorted(places, key=order):
        judging.see(place, sample, groups[place][sample])
    return judging


def test_the_first_completion_is_judged_before_the_last_one_is_sampled(tiny, tmp_path):
    """The last on_rollout waits for the first score: it would wait for ever if judging began after sampling."""
    policy = load_policy(ModelSettings(name_or_path=str(tiny("qwen3")), device="cpu", dtype="float32"))
    engine = GenericEngine(policy, stop_ids=[1], decode=lambda ids: "x" * len(ids), max_rows=2)
    problems = [
        Problem(prompt=str(i), token_ids=[3 + i, 4, 5], answer="1", index=i, prefill="") for i in range(4)
    ]
    with pool(tmp_path, PICKY) as rewards:
        judge = Judge(rewards)
        judging = judge.begin()
        waited = []

        def on_rollout(place, sample, rollout):
            judging.see(place, sample, rollout)
            if len(judging._begun) == 8:
                first = next(iter(judging._begun.values()))
                waited.append(first.result(timeout=PATIENCE_S).value)

        sampling = SamplingSettings(max_new_tokens=5)
        groups = engine.generate(problems, n=2, sampling=sampling, seed=3, on_rollout=on_rollout)
        assert waited and waited[0] is not None
        assert judging.scores(groups) == judge.score(groups)


def test_scores_do_not_depend_on_the_order_completions_come_in(tmp_path):
    groups = [rollouts("a", "bb", "ccc"), rollouts("dddd", "eeeee", "f")]
    with pool(tmp_path, PICKY) as rewards:
        judge = Judge(rewards)
        expected = [[Score(1.0), Score(2.0), Score(3.0)], [Score(4.0), Score(5.0), Score(1.0)]]
        assert judge.score(groups) == expected
        rng = random.Random(0)
        for _ in range(3):
            assert seen(judge, groups, order=lambda _: rng.random()).scores(groups) == expected


def test_the_error_is_the_first_completions_in_the_groups_order(tmp_path):
    groups = [rollouts("fine", "bad one"), rollouts("bad two", "fine")]
    with pool(tmp_path, PICKY) as rewards:
        items = [(r.text, r.problem) for group in groups for r in group]
        with pytest.raises(RewardError) as expected:
            list(rewards.score_iter(items))
        judging = seen(Judge(rewards), groups, order=lambda at: (-at[0], -at[1]))
        with pytest.raises(RewardError) as error:
            judging.scores(groups)
        assert str(error.value) == str(expected.value) and "no bad one" in str(error.value)
        assert Judge(rewards).score([rollouts("ok")]) == [[Score(2.0)]]  # the processes go on
    with pool(tmp_path, PICKY, on_error="mask") as rewards:
        scores = seen(Judge(rewards), groups, order=lambda at: -at[1]).scores(groups)
        assert [[s.value for s in own] for own in scores] == [[4.0, None], [None, 4.0]]


def test_a_reward_model_scores_the_whole_round_at_once_beside_functions_that_began(tmp_path):
    calls = []

    class Model:
        def score(self, items):
            calls.append([text for text, _ in items])
            return [Score(10.0 * len(text)) for text, _ in items]

        def close(self):
            pass

    groups = [rollouts("a", "bb"), rollouts("ccc", "dddd")]
    with pool(tmp_path, PICKY) as function:
        parts = [
            Weighed(name="f", weight=1.0, reward=function),
            Weighed(name="m", weight=2.0, reward=Model()),
        ]
        rewards = Rewards(parts, settings=RewardSettings())
        judging = seen(Judge(rewards), groups, order=lambda at: -at[0])
        assert calls == []
        scores = judging.scores(groups)
    assert calls == [["a", "bb", "ccc", "dddd"]]
    assert [[s.value for s in own] for own in scores] == [[21.0, 42.0], [63.0, 84.0]]


# one round ahead ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny, tmp_path):
    """A function (name, settings by section) -> lines of metrics.jsonl without times, samples by step."""

    def start(name, *, evaluates=False, **sections):
        (tmp_path / "reward.py").write_text(VARIED)
        rows = [{"prompt": f"{i}+{i % 3}", "answer": str(i + i % 3)} for i in range(24)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "output_dir": str(tmp_path / name),
            "model": {"name_or_path": str(tiny("qwen3")), "dtype": "float32"},
            "data": {
                "train": [str(tmp_path / "rows.jsonl")], "system_prompt": "",
                "eval": [str(tmp_path / "rows.jsonl")] if evaluates else [],
            },
            "reward": {"function": f"{tmp_path / 'reward.py'}:reward", "num_workers": 1, "timeout_s": 20},
            "rollout": {
                "prompts_per_round": 3, "num_generations": 4, "max_new_tokens": 6, "rounds_ahead": 1,
                "engine": "generic", "final_temperature": 1.2,
            },
            "grpo": {"is_cap": 2},
            "train": {"max_steps": 4, "num_threads": 1},
            "optim": {"learning_rate": 1e-2, "lr_scheduler": "constant"},
            "log": {"report_to": ["none"], "steps": 1},
        }  # fmt: skip
        for section, values in sections.items():
            settings[section] = {**settings.get(section, {}), **values}
        folder = run_recipe("grpo", grpo.Settings.model_validate(settings))
        read = [(folder / name).read_text().splitlines() for name in ("metrics.jsonl", "samples.jsonl")]
        lines, samples = ([json.loads(line) for line in text] for text in read)
        lines = [{k: v for k, v in line.items() if not k.startswith(VOLATILE)} for line in lines]
        by_step = {}
        for sample in samples:
            by_step.setdefault(sample["step"], []).append(sample)
        return lines, by_step

    return start


KINDS = {
    "generic": {},
    "LoRA": {"lora": {"rank": 4}},
    "native": {"rollout": {"engine": "native"}},
    "native LoRA": {"rollout": {"engine": "native"}, "lora": {"rank": 4}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_what_the_threads_do_meanwhile(kind, run, monkeypatch, request):
    """The thread beside training gives what sampling before training does, and evaluation does not disturb it."""
    if "native" in kind:
        request.getfixturevalue("kernels")
    lines, samples = run("threads", **KINDS[kind])
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1, 1]
    evaluated, same = run("evaluated", eval={"steps": 1, "max_rows": 2}, evaluates=True, **KINDS[kind])
    assert all("eval/reward" in line for line in evaluated)
    assert [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in evaluated] == lines
    assert same == samples

    def at_once(self, problems, *, on_rollout, **how):
        future = Future()
        future.set_result(self._engine.generate(problems, on_rollout=on_rollout, **how))
        return future

    monkeypatch.setattr(BackgroundEngine, "begin", at_once)
    assert run("at once", **KINDS[kind]) == (lines, samples)


def test_a_round_is_sampled_with_the_weights_before_the_last_rounds_updates(run):
    """With a learning rate of 0 nothing is stale. The first two rounds are sampled by the start, the third is not."""
    frozen, expected = run("frozen", optim={"learning_rate": 0})
    now, present = run("now", optim={"learning_rate": 0}, rollout={"rounds_ahead": 0})
    assert present == expected
    assert [line.pop("rollout/staleness") for line in frozen] == [0, 1, 1, 1]
    assert frozen == now
    lines, samples = run("learning")
    assert samples[1] == expected[1] and samples[2] == expected[2] and samples[3] != expected[3]
    assert lines[0]["rollout/sampler_kl"] == pytest.approx(0, abs=1e-6)
    assert all(line["rollout/sampler_kl"] > 1e-5 for line in lines[1:])


def test_staleness_counts_optimizer_steps(run):
    lines, _ = run("updates", rollout={"updates_per_round": 2}, train={"max_steps": 6, "num_threads": 1})
    assert [line["rollout/staleness"] for line in lines if "rollout/staleness" in line] == [0, 2, 2]


def test_an_error_while_sampling_ahead_ends_the_run(run, monkeypatch):
    calls = []
    original = GenericEngine.generate

    def failing(self, problems, **how):
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            raise RewardError("the third round broke")
        return original(self, problems, **how)

    monkeypatch.setattr(GenericEngine, "generate", failing)
    with pytest.raises(RewardError, match="the third round broke"):
        run("broken")
    assert all(name.startswith("kitae-rollout") for name in calls) and len(calls) == 3
    assert not any(thread.name.startswith("kitae-rollout") for thread in threading.enumerate())


@pytest.mark.parametrize("kind", ["generic", "native"])
def test_closing_waits_for_no_completion(kind, tiny, kernels, monkeypatch):
    """The completions would be 400 tokens long, and no more than their first come before it is closed."""
    policy = load_policy(ModelSettings(name_or_path=str(tiny("qwen3")), device="cpu", dtype="float32"))
    how = {"stop_ids": [], "decode": lambda ids: "x" * len(ids), "max_rows": 2}
    engine = (
        GenericEngine(policy, **how) if kind == "generic" else NativeEngine(policy, kernels=kernels, **how)
    )
    background, finished = BackgroundEngine(engine, source=policy), []
    generate = engine.generate

    def until_closed(problems, *, on_tokens, **how):
        def first_wait(*place):
            assert background._is_closed.wait(60)
            on_tokens(*place)

        return generate(problems, on_tokens=first_wait, **how)

    monkeypatch.setattr(engine, "generate", until_closed)
    problems = [Problem(prompt="1", token_ids=[3, 4, 5], answer="1")]
    background.sync()
    future = background.begin(
        problems, n=2, sampling=SamplingSettings(max_new_tokens=400), seed=3,
        on_rollout=lambda *_: finished.append(1),
    )  # fmt: skip
    background.close()
    assert isinstance(future.exception(), CancelledError) and not finished


def test_a_checkpoint_whose_problems_are_gone_is_refused():
    problems = [Problem(prompt="1", token_ids=[1], index=index) for index in (3, 4)]
    ahead = _ahead.Ahead(
        None, problems=problems, sampler=None, judge=None, num_generations=1, temperature_at=None,
        round_starts=range(1, 2), timer=None,
    )  # fmt: skip
    assert {index: p.index for index, p in ahead._by_index({3, 4}).items()} == {3: 3, 4: 4}
    with pytest.raises(CheckpointError, match="rows \\[9\\]"):
        ahead._by_index({3, 9})
