"""`kitae launch --nproc_per_node 2` gives what one process gives: losses, rewards, samples and weights."""

import json
import os
import random
import subprocess
import sys

import pytest
from safetensors.torch import load_file


def rows_for(tmp_path):
    rng = random.Random(1)
    rows = []
    for _ in range(20):
        a, b = rng.randint(1, 99), rng.randint(1, 9)
        thinking = "so " * rng.randint(0, 9)
        completion = f"<think>{thinking}</think><answer>{a + b}</answer>"
        rows.append({"prompt": f"{a}+{b}", "completion": completion, "answer": str(a + b)})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(arguments, *, ranks, home):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KITAE_HOME": str(home)}
    launch = ["launch", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, "-m", "kitae", *launch, "train", *arguments, "--train.num_threads", "1"],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time", "perf/"))} for line in lines]


def assert_same(one, two):
    first, second = metrics_of(one), metrics_of(two)
    assert [set(m) for m in first] == [set(m) for m in second]
    for a, b in zip(first, second, strict=True):
        assert b == pytest.approx(a, rel=2e-4, abs=2e-6)
    weights = [load_file(next(folder.glob("*.safetensors"))) for folder in (one, two)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 2e-5, name


@pytest.mark.parametrize("lora", [0, 4])
def test_sft_on_two_ranks_equals_one_process(lora, tiny, tmp_path):
    data = rows_for(tmp_path)
    common = [
        "sft", "--model_name_or_path", str(tiny("llama")), "--data.train", str(data), "--max_steps", "4",
        "--lora.rank", str(lora), "--learning_rate", "1e-3", "--eval.steps", "2", "--log.report_to", "none",
        "--model.dtype", "float32",  # what is compared is the sum over ranks, not bfloat16's rounding
    ]  # fmt: skip
    one = [*common, "--per_device_train_batch_size", "6", "--output_dir", str(tmp_path / "one")]
    two = [*common, "--per_device_train_batch_size", "3", "--output_dir", str(tmp_path / "two")]
    train(one, ranks=1, home=tmp_path / "home")
    train(two, ranks=2, home=tmp_path / "home")
    assert_same(tmp_path / "one", tmp_path / "two")


GRPO_VARIANTS = {
    "plain": ["--grpo.kl_coef", "0.01", "--eval.steps", "2"],
    "sequence": [
        "--grpo.ratio", "sequence", "--grpo.average", "sequence", "--grpo.advantage", "reinforce++",
        "--rollout.refill", "2", "--rollout.overlong_buffer", "3", "--rollout.updates_per_round", "2",
    ],
    "refreshed": [
        "--grpo.kl_coef", "0.1", "--grpo.ref_refresh_rounds", "1", "--grpo.is_cap", "2", "--grpo.entropy_coef", "0.01",
        "--grpo.scale_by_std", "batch", "--rollout.curriculum", "pass_rate", "--rollout.refill", "1",
    ],
    "refreshed adapter": ["--grpo.kl_coef", "0.1", "--grpo.ref_refresh_rounds", "1", "--lora.rank", "4"],
    "ahead": ["--rollout.rounds_ahead", "1", "--grpo.is_cap", "2", "--eval.steps", "2"],
    "ahead adapter": ["--rollout.rounds_ahead", "1", "--grpo.is_cap", "2", "--lora.rank", "4"],
    "native": ["--rollout.engine", "native", "--eval.steps", "2"],
    "native adapter": ["--rollout.engine", "native", "--lora.rank", "4"],
    "native experts": ["--rollout.engine", "native"],
    "native experts adapter": ["--rollout.engine", "native", "--lora.rank", "4"],
}  # fmt: skip


@pytest.mark.parametrize("variant", GRPO_VARIANTS)
def test_grpo_on_two_ranks_samples_and_learns_what_one_process_does(variant, tiny, tmp_path, request):
    if "native" in variant:
        request.getfixturevalue("kernels")
    data = rows_for(tmp_path)
    model = tiny("deepseek_v3" if "experts" in variant else "qwen3")
    common = [
        "grpo", "--model_name_or_path", str(model), "--data.train", str(data), "--max_steps", "3",
        "--rollout.prompts_per_round", "3", "--rollout.num_generations", "4", "--rollout.max_new_tokens", "6",
        "--learning_rate", "1e-3", "--optim.epsilon", "1e-4", "--log.report_to", "none", "--log.steps", "1",
        "--model.dtype", "float32",
        "--reward.function", f"{tmp_path / 'reward.py'}:reward", *GRPO_VARIANTS[variant],
    ]  # fmt: skip
    # Every other prompt has a dead group.
    (tmp_path / "reward.py").write_text(
        "def reward(completion, *, prompt, answer, **columns):\n"
        "    return 1.0 if int(answer) % 2 else float(sum(map(ord, completion)) % 7)\n"
    )
    for name, ranks in (("one", 1), ("two", 2)):
        train([*common, "--output_dir", str(tmp_path / name)], ranks=ranks, home=tmp_path / "home")

    def samples(name):
        lines = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        return sorted((s["step"], s["problem"], s["sample"], s["completion"], s["reward"]) for s in lines)

    assert samples("one") == samples("two")
    assert_same(tmp_path / "one", tmp_path / "two")
    difficulties = [(tmp_path / name / "difficulty.jsonl").read_text() for name in ("one", "two")]
    assert difficulties[0] == difficulties[1]
    if "--rollout.refill" in common:
        assert sum(
            line["rollout/refilled_groups"]
            for line in metrics_of(tmp_path / "one")
            if "rollout/reward" in line
        )


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_a_rank_without_prompts_keeps_step_with_the_others(recipe, tiny, tmp_path):
    """It samples nothing, so FSDP has seen other layers run on it before the backward than on the rank beside it."""
    (tmp_path / "own.py").write_text(
        "def reward(completion, *, prompt, answer, **columns):\n    return float(sum(map(ord, completion)) % 7)\n"
    )
    common = [
        recipe, "--model_name_or_path", str(tiny("llama")), "--data.train", str(rows_for(tmp_path)), "--max_steps", "3",
        "--rollout.prompts_per_round", "1", "--rollout.num_generations", "3", "--rollout.max_new_tokens", "6",
        "--reward.function", f"{tmp_path / 'own.py'}:reward", "--learning_rate", "1e-3", "--log.report_to", "none",
        "--model.dtype", "float32", "--rollout.engine", "generic",
    ]  # fmt: skip
    train([*common, "--output_dir", str(tmp_path / "one")], ranks=1, home=tmp_path / "home")
    train([*common, "--output_dir", str(tmp_path / "two")], ranks=2, home=tmp_path / "home")
    assert_same(tmp_path / "one", tmp_path / "two")
