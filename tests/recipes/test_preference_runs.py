"""Preference runs in several lives and on several ranks equal one run in one process."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
VOLATILE = ("time", "perf/")


@pytest.fixture
def pairs(tmp_path):
    """70 pairs: three writes of the reference's cache."""
    rng = random.Random(0)
    rows = []
    for i in range(70):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        rows.append({"prompt": f"{i}:{a}+{b}", "chosen": f"{a + b}" + "a" * (i % 5), "rejected": f"-{a}bc"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def finished(command, *, home, timeout=300):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KITAE_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def live(recipe, settings, kills, *, home):
    """What the lives said."""
    words = [sys.executable, str(HERE / "killed_lives.py"), recipe, json.dumps(settings), json.dumps(kills)]
    return finished(words, home=home)


def settings_for(folder, model, data, *, lora):
    return {
        "output_dir": str(folder),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "lora": {"rank": 4, "dropout": 0.2} if lora else {"rank": 0},
        "data": {"train": [str(data)]},
        "train": {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 9,
            "num_threads": 1,
        },
        "optim": {"learning_rate": 3e-3},
        "save": {"steps": 2},
        "log": {"report_to": ["none"]},
        "eval": {"steps": 3, "max_rows": 6},
    }


def outcome(folder):
    metrics = [
        {name: value for name, value in json.loads(line).items() if not name.startswith(VOLATILE)}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    (weights,) = folder.glob("*.safetensors")
    return metrics, {name: tensor.numpy().tobytes() for name, tensor in load_file(weights).items()}


KILLS = [
    # logprobs: once to look at earlier numbers (there are none), then once for each write; so after the first write.
    ["kitae.train.learner", "Learner", "logprobs", 3],
    ["kitae.train.learner", "Learner", "optim_step", 3],
    ["kitae.data.loader", "Loader", "take", 4],
]


@pytest.mark.parametrize(("recipe", "lora"), [("dpo", False), ("kto", True)])
def test_killed_runs_equal_continuous_ones_to_the_bit(recipe, lora, tiny, pairs, tmp_path):
    model, home = tiny("qwen3"), tmp_path / "home"
    live(recipe, settings_for(tmp_path / "whole", model, pairs, lora=lora), [], home=home)
    kills = KILLS[1:] if lora else KILLS
    said = live(recipe, settings_for(tmp_path / "killed", model, pairs, lora=lora), kills, home=home)
    assert said.count("was killed") == len(kills)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    caches = [tmp_path / name / "reference.jsonl" for name in ("whole", "killed")]
    assert [cache.exists() for cache in caches] == [not lora] * 2
    if not lora:
        assert caches[0].read_bytes() == caches[1].read_bytes()


@pytest.mark.parametrize(("recipe", "lora", "held_out"), [("dpo", 4, 1), ("kto", 0, 4)])
def test_two_ranks_equal_one_process(recipe, lora, held_out, tiny, pairs, tmp_path):
    """A whole epoch of 4 pairs a step: the last step of dpo, and its evaluation, have one pair for two ranks."""
    common = [
        "train", recipe, "--model_name_or_path", str(tiny("llama")), "--data.train", str(pairs),
        "--max_steps", "18", "--lora.rank", str(lora), "--learning_rate", "1e-3", "--eval.steps", "9",
        "--eval.max_rows", str(held_out), "--data.hold_out", "0.1", "--log.report_to", "none",
        "--model.dtype", "float32", "--train.num_threads", "1",
    ]  # fmt: skip
    for name, ranks in (("one", 1), ("two", 2)):
        launch = ["launch", "--nproc_per_node", "2"] if ranks > 1 else []
        size = ["--per_device_train_batch_size", str(4 // ranks), "--output_dir", str(tmp_path / name)]
        finished([sys.executable, "-m", "kitae", *launch, *common, *size], home=tmp_path / "home")
    first, second = outcome(tmp_path / "one")[0], outcome(tmp_path / "two")[0]
    assert [set(line) for line in first] == [set(line) for line in second]
    for a, b in zip(first, second, strict=True):
        assert b == pytest.approx(a, rel=5e-4, abs=5e-5)
    weights = [load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("one", "two")]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-4, name
