"""model.torch_compile in a run: its time is shown, and without a compiler it is refused."""

import json

import pytest
from torch import nn

from kitae.errors import ConfigError
from kitae.recipes import sft
from kitae.recipes._run import run_recipe


@pytest.fixture
def run(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i} + 1 = ", "completion": "{i + 1}"}}\n' for i in range(8)))

    def steps_of(**model):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "overwrite": True,
            "model": {"name_or_path": str(tiny("qwen3")), "device": "cpu", "dtype": "float32", **model},
            "data": {"train": [str(rows)], "target": "as_is"},
            "train": {"max_steps": 2, "per_device_train_batch_size": 2},
            "log": {"report_to": ["none"]},
        }
        run_recipe("sft", sft.Settings.model_validate(settings))
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "train/loss" in line]

    return steps_of


def test_a_step_says_how_long_compiling_took(run, monkeypatch):
    compile_layer = nn.Module.compile
    # The frontend only: what the whole compiler makes of a layer takes it half a minute.
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_layer(self, backend="eager"))
    plain, compiled = run(), run(torch_compile=True)
    assert all("time/compile_s" not in step for step in plain)
    assert 0 < compiled[0]["time/compile_s"] <= compiled[0]["time/step_s"]
    assert [s["train/loss"] for s in compiled] == pytest.approx([s["train/loss"] for s in plain], rel=1e-5)


def test_torch_compile_without_a_compiler_is_refused(run, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"torch_compile is true, but there is no C\+\+ compiler .*set it to false"
    ):
        run(torch_compile=True)
