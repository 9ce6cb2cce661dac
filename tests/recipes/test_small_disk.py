"""A disk that cannot hold two checkpoints is refused when the model is known, not when hours of work are lost."""

import json
import shutil
from collections import namedtuple

import pytest
from safetensors.torch import load_file

from kitae.errors import RunDirError
from kitae.recipes import sft
from kitae.recipes._run import run_recipe
from kitae.train.learner import Learner

Usage = namedtuple("Usage", "total used free")


def settings_for(tmp_path, model, *, optimizer="adamw", lora=0):
    rows = [{"prompt": f"{i}+1", "completion": f"<think></think><answer>{i + 1}</answer>"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sft.Settings.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "lora": {"rank": lora},
            "data": {"train": [str(tmp_path / "rows.jsonl")]},
            "optim": {"name": optimizer},
            "train": {"max_steps": 1, "per_device_train_batch_size": 2},
            "log": {"report_to": ["none"]},
        }
    )


@pytest.fixture
def disk_for_weights(tiny, monkeypatch):
    """A disk with room for two checkpoints of the tiny model's weights in float32, and for two of one moment."""
    sizes = [tensor.numel() for tensor in load_file(tiny("qwen3") / "model.safetensors").values()]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 2 * 8 * sum(sizes)))
    return tiny("qwen3")


def test_weights_and_moments_that_do_not_fit_twice_are_refused_before_the_first_step(
    disk_for_weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(Learner, "forward_backward", lambda *_, **__: pytest.fail("it took a step"))
    with pytest.raises(RunDirError) as error:
        run_recipe("sft", settings_for(tmp_path, disk_for_weights))
    assert "\n" not in str(error.value)
    for part in (
        "disk too small: need 2.",
        "have 1.",
        "One checkpoint takes",
        "lora.rank",
        "optim.name = adafactor",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("less", [{"optimizer": "adafactor"}, {"lora": 4}])
def test_what_the_error_advises_fits(disk_for_weights, tmp_path, less):
    run_recipe("sft", settings_for(tmp_path, disk_for_weights, **less))
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()
