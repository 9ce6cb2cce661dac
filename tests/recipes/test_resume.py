"""A run that was killed and resumed equals one that was not, to the last bit (fp32, one thread)."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kitae.compiler import BuildError
from kitae.errors import CheckpointError
from kitae.models import native
from kitae.recipes import sft
from kitae.recipes._run import run_recipe
from kitae.train.learner import Learner

HERE = Path(__file__).parent
VOLATILE = ("time", "perf/")


def rows_for(tmp_path):
    rng = random.Random(0)
    rows = []
    for _ in range(24):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        rows.append(
            {
                "prompt": f"{a}+{b}",
                "completion": f"<think></think><answer>{a + b}</answer>",
                "answer": str(a + b),
            }
        )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_for(recipe, folder, model, data):
    common = {
        "output_dir": str(folder),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "lora": {"rank": 4, "dropout": 0.2} if recipe == "sft" else {"rank": 0},
        "data": {"train": [str(data)], "system_prompt": ""},
        "optim": {"learning_rate": 3e-3},
        "save": {"steps": 2 if recipe == "sft" else 1},
        "log": {"report_to": ["none"]},
        "eval": {"steps": 3, "max_rows": 2},
    }
    if recipe == "sft":
        batch = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 9,
            "num_threads": 1,
        }
        return {**common, "train": batch}
    rollout = {
        "prompts_per_round": 3, "num_generations": 4, "max_new_tokens": 8, "updates_per_round": 2, "epochs_per_round": 2,
        "inference_batch_size": 8, "stop": ["7", "<a"],
    }  # fmt: skip
    train = {"max_steps": 9, "num_threads": 1}
    if recipe == "grpo, native":
        rollout["engine"] = "native"
    if recipe in ("grpo", "grpo, native"):
        return {**common, "train": train, "rollout": rollout, "grpo": {"kl_coef": 0.01}}
    if recipe == "grpo, native int8":
        rollout |= {"quantization": "int8", "kv_cache_tokens": 160}
        return {**common, "train": train, "rollout": rollout, "grpo": {"is_cap": 2}}
    reward = data.with_name("reward.py")
    reward.write_text(  # a dead group for every other prompt
        "def reward(completion, *, prompt, answer, **columns):\n"
        "    return 1.0 if int(answer) % 2 else float(sum(map(ord, completion)) % 7)\n"
    )
    if recipe == "grpo, ahead":
        rollout |= {"updates_per_round": 1, "rounds_ahead": 1}
        judged = {"function": f"{reward}:reward", "num_workers": 1, "timeout_s": 20}
        return {**common, "train": train, "rollout": rollout, "reward": judged, "grpo": {"is_cap": 2}}
    return {
        **common,
        "lora": {"rank": 4 if recipe == "grpo, LoRA" else 0},
        "train": {**train, "max_steps": 10},
        "reward": {"function": f"{reward}:reward", "num_workers": 1, "timeout_s": 20},
        "rollout": {**rollout, "epochs_per_round": 1, "refill": 2, "curriculum": "pass_rate", "overlong_buffer": 4},
        "grpo": {
            "kl_coef": 0.1, "ref_refresh_rounds": 2, "is_cap": 2, "entropy_coef": 0.01, "advantage": "reinforce++",
        },
    }  # fmt: skip


def live(recipe, settings, kills):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "KITAE_HOME": str(Path(settings["output_dir"]).parent / "home"),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_lives.py"), recipe.partition(",")[0], json.dumps(settings), json.dumps(kills)],
        capture_output=True, text=True, env=environment, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.count("was killed")


def outcome(folder):
    folder = Path(folder)
    metrics = [
        {name: value for name, value in json.loads(line).items() if not name.startswith(VOLATILE)}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    texts = [folder / name for name in ("samples.jsonl", "difficulty.jsonl")]
    (weights,) = folder.glob("*.safetensors")
    tensors = {name: tensor.numpy().tobytes() for name, tensor in load_file(weights).items()}
    return metrics, [path.read_text() if path.exists() else "" for path in texts], tensors


KILLS = {
    "sft": [
        ["kitae.train.learner", "Learner", "optim_step", 3],
        ["kitae.train.learner", "Learner", "_one_pass", 3],
        ["kitae.data.loader", "Loader", "take", 4],
    ],
    "grpo": [
        ["kitae.rollout.generic", "PackedRows", "advance", 3],
        ["kitae.rewards.pool", "RewardPool", "begin", 5],
        ["kitae.train.learner", "Learner", "optim_step", 2],
        ["kitae.rewards.pool", "RewardPool", "finish", 2],
        ["kitae.train.learner", "Learner", "optim_step", 3],
        ["kitae.train.learner", "Learner", "_one_pass", 1],
    ],
    "grpo, ahead": [
        ["kitae.recipes._ahead", "Ahead", "_begin", 2],
        ["kitae.rewards.pool", "RewardPool", "begin", 20],
        ["kitae.train.learner", "Learner", "optim_step", 3],
        ["kitae.recipes._ahead", "Ahead", "state", 2],
        ["kitae.train.learner", "Learner", "_one_pass", 2],
        ["kitae.recipes._ahead", "Ahead", "round", 2],
    ],
    "grpo, native": [
        ["kitae.rollout.native", "NativeRows", "advance", 2],
        ["kitae.train.learner", "Learner", "optim_step", 3],
        ["kitae.rollout.native", "NativeRows", "enter", 2],
        ["kitae.rollout.native", "NativeEngine", "sync", 1],
    ],
    "grpo, native int8": [
        ["kitae.rollout.native", "NativeRows", "advance", 2],
        ["kitae.train.learner", "Learner", "optim_step", 3],
        ["kitae.recipes._variants", "OwnLogprobs", "annotate", 2],
    ],
    "grpo, variants": [
        ["kitae.recipes._prompts", "Prompts", "_replace", 2],
        ["kitae.train.learner", "Learner", "optim_step", 3],
        ["kitae.recipes._prompts", "Prompts", "_replace", 5],
        ["kitae.models.frozen", "RenewedWeights", "renew", 1],
        ["kitae.train.learner", "Learner", "optim_step", 2],
    ],
    "grpo, LoRA": [
        ["kitae.train.learner", "Learner", "optim_step", 3],
        ["kitae.models.frozen", "RenewedWeights", "renew", 1],
        ["kitae.train.learner", "Learner", "optim_step", 2],
    ],
}


@pytest.mark.parametrize("recipe", KILLS)
def test_killed_at_a_step_in_a_window_and_in_a_round_equals_continuous(recipe, tiny, tmp_path, request):
    if "native" in recipe:
        request.getfixturevalue("kernels")
    data, model = rows_for(tmp_path), tiny("qwen3")
    live(recipe, settings_for(recipe, tmp_path / "whole", model, data), [])
    expected = outcome(tmp_path / "whole")
    assert [m["step"] for m in expected[0]] == list(range(1, len(expected[0]) + 1))
    assert len(expected[0]) >= 9
    killed = live(recipe, settings_for(recipe, tmp_path / "killed", model, data), KILLS[recipe])
    assert killed == len(KILLS[recipe])
    assert outcome(tmp_path / "killed") == expected


@pytest.mark.parametrize("recipe", ["sft", "grpo"])
def test_killed_at_random_times_equals_continuous(recipe, tiny, tmp_path):
    rng = random.Random(os.environ.get("KITAE_TEST_SEED", "20"))
    data, model = rows_for(tmp_path), tiny("qwen3")
    live(recipe, settings_for(recipe, tmp_path / "whole", model, data), [])
    kills = [rng.uniform(0.3, 4.0) for _ in range(6)]
    print("killed after", kills)
    live(recipe, settings_for(recipe, tmp_path / "killed", model, data), kills)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_run_is_not_resumed_without_the_kernels_it_began_with(tiny, tmp_path, monkeypatch):
    if native.library() is None:
        pytest.skip("no kernels on this machine")
    settings = settings_for("sft", tmp_path / "run", tiny("qwen3"), rows_for(tmp_path))
    original = Learner.optim_step

    def failing(self):
        if self.step == 4:
            raise RuntimeError("enough")
        return original(self)

    monkeypatch.setattr(Learner, "optim_step", failing)
    with pytest.raises(RuntimeError, match="enough"):
        run_recipe("sft", sft.Settings.model_validate(settings))

    def refuse(*_):
        raise BuildError("there is no C++ compiler")

    monkeypatch.setattr(native, "load_library", refuse)
    native.library.cache_clear()
    try:
        with pytest.raises(CheckpointError, match="training_kernels native -> torch"):
            run_recipe("sft", sft.Settings.model_validate({**settings, "resume": True}))
    finally:
        native.library.cache_clear()
