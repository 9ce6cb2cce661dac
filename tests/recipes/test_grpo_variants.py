"""Short GRPO runs with each variant on: what is logged, what is written, and that the toy task is learnt."""

import json
from collections import Counter

import pytest

from kitae.recipes import grpo
from kitae.recipes._run import run_recipe

MIXED = (
    "def reward(completion, *, prompt, answer, **columns):\n"
    "    return 1.0 if int(answer) % 2 else float(sum(map(ord, completion)) % 7)\n"
)
"""Every other prompt has a dead group."""
VARIED = (
    "def reward(completion, *, prompt, answer, **columns):\n    return float(sum(map(ord, completion)) % 7)\n"
)
MANY_A = (
    "def reward(completion, *, prompt, answer, **columns):\n"
    "    return completion.count('a') / max(len(completion), 1)\n"
)


@pytest.fixture
def run(tiny, tmp_path):
    """A function (reward's text, settings by section) -> lines of metrics.jsonl, samples, the run's folder."""

    def start(reward, *, name="run", **sections):
        (tmp_path / "reward.py").write_text(reward)
        rows = [{"prompt": f"{i}+{i % 3}", "answer": str(i + i % 3)} for i in range(24)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "output_dir": str(tmp_path / name),
            "model": {"name_or_path": str(tiny("qwen3")), "dtype": "float32"},
            "data": {"train": [str(tmp_path / "rows.jsonl")], "system_prompt": ""},
            "reward": {"function": f"{tmp_path / 'reward.py'}:reward", "num_workers": 1, "timeout_s": 20},
            "rollout": {"prompts_per_round": 4, "num_generations": 4, "max_new_tokens": 6},
            "train": {"max_steps": 4, "num_threads": 1},
            "optim": {"learning_rate": 1e-2, "lr_scheduler": "constant"},
            "log": {"report_to": ["none"], "steps": 1},
        }
        for section, values in sections.items():
            settings[section] = {**settings.get(section, {}), **values}
        folder = run_recipe("grpo", grpo.Settings.model_validate(settings))
        read = [(folder / name).read_text().splitlines() for name in ("metrics.jsonl", "samples.jsonl")]
        lines, samples = ([json.loads(line) for line in text] for text in read)
        return lines, samples, folder

    return start


@pytest.mark.parametrize(("lora", "quantization"), [(0, "none"), (4, "none"), (4, "nf4")])
def test_a_refreshed_reference_is_the_policy_of_its_round(run, lora, quantization):
    """Two updates a round, refreshed every second round: the KL is 0 at steps 1 and 5, and only there."""
    lines, _, _ = run(
        VARIED, lora={"rank": lora}, model={"quantization": quantization},
        grpo={"kl_coef": 0.01, "ref_refresh_rounds": 2}, train={"max_steps": 6},
        rollout={"updates_per_round": 2},
    )  # fmt: skip
    kl = [line["train/kl"] for line in lines]
    for step in (1, 5):
        assert kl[step - 1] == pytest.approx(0, abs=1e-6)
    for step in (2, 3, 4, 6):
        assert kl[step - 1] > 1e-5


def test_refilled_groups_are_reported_written_and_not_trained_on_twice(run):
    lines, samples, folder = run(MIXED, rollout={"refill": 8}, train={"max_steps": 3})
    for line in lines:
        own = [s for s in samples if s["step"] == line["step"]]
        assert len(own) == 4 * (4 + line["rollout/refilled_groups"])
        assert line["rollout/dead_after_refill"] == 0
        assert line["rollout/reward"] == pytest.approx(sum(s["reward"] for s in own) / len(own))
        assert len({(s["problem"], s["sample"]) for s in own}) == len(own)
    assert sum(line["rollout/refilled_groups"] for line in lines) > 0
    counted = Counter(s["problem"] for s in samples)
    standings = [json.loads(line) for line in (folder / "difficulty.jsonl").read_text().splitlines()]
    assert {s["problem"]: s["attempts"] for s in standings} == dict(counted)
    for standing in standings:
        rewards = [s["reward"] for s in samples if s["problem"] == standing["problem"]]
        assert standing["reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert standing["pass_rate"] == sum(r >= 1 for r in rewards) / len(rewards)


def test_overlong_rewards_are_shaped_for_training_only(run):
    """All rewards are equal: only the shaping by length can give a gradient."""
    constant = "def reward(completion, *, prompt, answer, **columns):\n    return 1.0\n"
    plain, samples, _ = run(constant, train={"max_steps": 2})
    assert all(line["train/grad_norm"] == 0 for line in plain)
    assert len({s["tokens"] for s in samples}) > 1, "every completion is equally long"
    shaped, samples, _ = run(
        constant,
        name="shaped",
        train={"max_steps": 2},
        rollout={"overlong_buffer": 6, "overlong_factor": 3.0},
    )
    for line in shaped:
        own = [s for s in samples if s["step"] == line["step"]]
        expected = sum(-3.0 * s["tokens"] / 6 for s in own) / len(own)
        assert line["rollout/overlong_penalty"] == pytest.approx(expected, rel=1e-5)
        assert line["rollout/reward"] == 1.0
        assert line["train/grad_norm"] > 0
    assert {s["reward"] for s in samples} == {1.0}


@pytest.mark.parametrize("reward", ["return 1.0", "return float(len(completion))"])
def test_a_first_round_that_teaches_nothing_is_told_at_once(run, caplog, reward):
    text = f"def reward(completion, *, prompt, answer, **columns):\n    {reward}\n"
    run(text, train={"max_steps": 2})
    told = [
        r.getMessage() for r in caplog.records if "nothing is learnt from the first round" in r.getMessage()
    ]
    assert len(told) == (reward == "return 1.0")


def test_in_float32_sampler_and_learner_agree_and_the_cap_changes_nothing(run):
    plain, _, _ = run(MIXED)
    capped, _, _ = run(MIXED, name="capped", grpo={"is_cap": 2})
    for one, other in zip(plain, capped, strict=True):
        assert other["rollout/sampler_kl"] == pytest.approx(0, abs=1e-6)
        assert other["rollout/is_capped"] == 0
        assert other["rollout/is_weight"] == pytest.approx(1, abs=1e-4)
        assert other["train/loss"] == pytest.approx(one["train/loss"], abs=1e-4)


def test_a_sampler_that_computes_otherwise_is_seen_and_weighed(run, monkeypatch):
    from kitae.recipes import _sampling

    sample = _sampling.Sampler.sample

    def other(self, *args, **kwargs):
        groups = sample(self, *args, **kwargs)
        for group in groups:
            for rollout in group:
                rollout.logprobs[:] = [x - 1.0 for x in rollout.logprobs]
        return groups

    monkeypatch.setattr(_sampling.Sampler, "sample", other)
    (line, *_), _, _ = run(MIXED, grpo={"is_cap": 2}, train={"max_steps": 1})
    assert line["rollout/is_capped"] == pytest.approx(1)
    assert line["rollout/is_weight"] == pytest.approx(2)
    assert line["rollout/sampler_kl"] == pytest.approx(2.71828 - 2, rel=1e-3)
    assert line["train/approx_kl"] == pytest.approx(0, abs=1e-6), (
        "the ratio is to the learner's own log-probs"
    )


@pytest.mark.parametrize("lora", [0, 4])
def test_int8_rollouts_train_and_their_mismatch_is_logged_and_corrected(run, kernels, lora):
    """Means over 96 tokens. The ratio's clip is around the learner's own log-probs, so the first update clips nothing."""
    how = {"grpo": {"is_cap": 2}, "lora": {"rank": lora}, "train": {"max_steps": 3}}
    plain, _, _ = run(VARIED, name="plain", rollout={"engine": "native"}, **how)
    lines, samples, _ = run(VARIED, rollout={"quantization": "int8"}, **how)
    for line, exact in zip(lines, plain, strict=True):
        assert exact["rollout/sampler_gap"] <= 1e-5
        assert 1e-4 <= line["rollout/sampler_gap"] <= 0.05
        assert 0 < line["rollout/sampler_kl"] <= 0.01
        assert line["rollout/is_weight"] == pytest.approx(1, abs=0.05)
        assert line["rollout/is_weight"] != 1
        assert line["rollout/is_capped"] == 0
        assert line["train/approx_kl"] == pytest.approx(0, abs=1e-6)
        assert line["train/grad_norm"] > 0
    assert len(samples) == 3 * 16


VARIANTS = {
    "rloo": {"advantage": "rloo"},
    "reinforce++": {"advantage": "reinforce++"},
    "batch": {"scale_by_std": "batch"},
    "gspo": {"ratio": "sequence", "average": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"objective": "cispo", "clip_high": 3.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_learns_the_toy_task(run, name):
    lines, _, _ = run(
        MANY_A,
        grpo=VARIANTS[name],
        train={"max_steps": 24},
        rollout={"num_generations": 8, "updates_per_round": 2},
    )
    rewards = [line["rollout/reward"] for line in lines if "rollout/reward" in line]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.08


def test_an_entropy_bonus_keeps_the_entropy_up(run):
    lines = {
        coef: run(MANY_A, name=f"run{coef}", grpo={"entropy_coef": coef}, train={"max_steps": 12},
                  rollout={"num_generations": 8})[0]
        for coef in (0.0, 0.3)
    }  # fmt: skip
    assert lines[0.3][-1]["rollout/entropy"] > lines[0.0][-1]["rollout/entropy"] + 0.2
    assert lines[0.3][0]["train/entropy"] == pytest.approx(lines[0.3][0]["rollout/entropy"], rel=0.2)
