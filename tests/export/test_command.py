"""kitae export on the command line and from Python."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch

import kitae as package
from kitae.cli._gate import told
from kitae.cli.completion import words
from kitae.cli.export import _Lines
from kitae.errors import ConfigError
from kitae.export.verify import verify
from kitae.train.files import human
from tests.export.conftest import tensors_of, write_model


@pytest.fixture
def adapter(tiny, tmp_path):
    from tests.export.test_merge import kitae_adapter

    return kitae_adapter(tiny("llama"), tmp_path / "adapter")


def test_merge_says_how_many_tensors_changed_and_writes_it_as_json(kitae, adapter, tmp_path):
    out = tmp_path / "merged"
    code, said, err = kitae("export", "merge", adapter, "--output", out, "--json", tmp_path / "found.json")
    assert (code, err) == (0, "")
    size = human((out / "model.safetensors").stat().st_size)
    assert said.startswith(f"14 of 21 tensors changed (14 have an adapter), {size} in 1 file: ")
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["command"], found["changed"], found["tensors"], found["output"]) == (
        "merge",
        14,
        21,
        str(out),
    )
    assert kitae("generate", out, "2+2", "--max_new_tokens", 2)[0] == 0


def test_a_comparison_that_takes_long_says_what_it_is_at(capsys):
    with told(every_s=0.01) as say:
        say("m.gguf answers the same prompts")
        while "comparing for" not in (said := capsys.readouterr().err):
            time.sleep(0.01)
    assert re.search(r"^kitae: comparing for 0 s: (it begins|m.gguf answers the same prompts)$", said, re.M)


def test_the_stages_of_a_comparison_are_told(adapter, tiny):
    stages = []
    verify(str(adapter), [tiny("llama")], say=stages.append)
    name = tiny("llama").name
    assert [s.removeprefix(f"{adapter} ").removeprefix(f"{tiny('llama')} ") for s in stages] == [
        "answers 6 prompts", "without the adapter answers them", f"the tensors of {name} are compared",
        f"{name} answers the same prompts",
    ]  # fmt: skip


def test_a_verb_alone_and_an_output_without_a_name_are_refused(kitae, adapter):
    assert (
        kitae("export", "merge")[2] == "kitae: error: nothing is named; kitae export merge --help says how\n"
    )
    for output in (".", "..", "/"):
        code, _, err = kitae("export", "merge", adapter, "--output", output)
        assert (code, err) == (
            2,
            f"kitae: error: output is '{output}', which names no new folder; give it a name\n",
        )


def test_a_runs_adapter_becomes_a_model_that_is_asked_as_the_run_was_taught(
    kitae, tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"{i}+{i}", "completion": f"<think>x</think><answer>{2 * i}</answer>"} for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(tiny("qwen3")), "dataset_name": "rows.jsonl", "output_dir": "run", "lora.rank": 4,
        "learning_rate": 0.05, "max_steps": 2, "system_prompt": "Be brief.",
    }  # fmt: skip
    run = package.train("sft", settings)
    assert kitae("export", "merge", run, "--output", "merged")[0] == 0
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "kitae_template.json" in names and not names & {"run.json", "metrics.jsonl", "checkpoints", "lock"}
    template = "kitae_template.json"
    assert (tmp_path / "merged" / template).read_bytes() == (run / template).read_bytes()
    asked = {"max_new_tokens": 8, "temperature": 0.0, "dtype": "float32"}
    before, after = (package.generate(str(folder), ["2+2", "3+4"], **asked) for folder in (run, "merged"))
    assert before == after


def test_python_writes_what_the_command_writes(kitae, adapter, tiny, tmp_path):
    kitae("export", "merge", adapter, "--output", tmp_path / "a")
    report = package.export("merge", adapter, tmp_path / "b")
    assert report["changed"] == 14
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert package.export("bf16-to-fp8", tiny("llama"), tmp_path / "fp8", num_workers=1)["converted"] == 14
    assert package.export("fp8-to-bf16", tmp_path / "fp8", tmp_path / "back")["converted"] == 14
    with pytest.raises(ConfigError, match="there is no kitae export mergee; did you mean"):
        package.export("mergee", adapter, tmp_path / "c")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mrege", "x", "--output", "y"], "there is no kitae export mrege; did you mean 'merge'"),
        (["merge", "x"], "output is required"),
        (["verify", "x"], "there is nothing to compare"),
        (["verify", "x", "y", "--output", "z"], "output (--output) has no effect on verify"),
        (["gguf", "x", "--type", "q4km"], "there is no GGUF type 'q4km'; did you mean 'Q4_K_M'"),
        (["gguf", "x", "--adapter_only", "--type", "q8_0"], "an adapter alone is written as f16 or f32"),
        (
            ["fp8-to-bf16", "x", "--output", "y", "--type", "f16"],
            "type (--type) has no effect on fp8-to-bf16",
        ),
        (["merge", "--output", "y"], "model is missing"),
        (
            ["fp8-to-bf16", "x", "--output", "y", "--dtype", "fp8"],
            "dtype (--dtype) has no effect on fp8-to-bf16",
        ),
        (["fp8-to-bf16", "x", "--output", "y", "--scale_format", "ue8m0"], "has no effect on fp8-to-bf16"),
        (["bf16-to-fp8", "x", "--output", "y", "--base", "z"], "base (--base) has no effect on bf16-to-fp8"),
        (["merge", "x", "--output", "y", "--scale_format", "ue8m0"], "has no effect unless dtype is fp8"),
        (["merge", "./nowhere", "--output", "y"], "no such folder: ./nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(argv, message, kitae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = kitae("export", *argv)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_is_one_line(kitae, tmp_path):
    folder = write_model(tmp_path / "in", {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4).bfloat16()})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, err = kitae("export", "bf16-to-fp8", folder, "--output", tmp_path / "out")
    assert code == 2 and "bytes long, its header says" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(kitae, adapter, tmp_path, monkeypatch):
    from kitae.export import convert

    real, asked = convert.read_bytes, []

    def read_bytes(*args):
        asked.append(args)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(convert, "read_bytes", read_bytes)
    code, _, err = kitae("export", "merge", adapter, "--output", tmp_path / "out", "--num_workers", 1)
    assert code == 130 and "the same command goes on from there\nkitae: interrupted" in err
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.partial").glob(".tmp-*"))
    assert kitae("export", "merge", adapter, "--output", tmp_path / "out", "--num_workers", 1)[0] == 0


def test_help_and_completion_know_the_verbs(kitae):
    assert "merge ADAPTER --output DIR " in kitae("export")[1]
    assert "--scale_format" in kitae("export", "bf16-to-fp8", "--help")[1]
    found = words()
    assert found["export",] == ["merge", "gguf", "fp8-to-bf16", "bf16-to-fp8", "verify"]
    assert {"--output", "--base", "--overwrite"} <= set(found["export", "merge"])


def test_a_terminal_has_a_bar_and_a_file_gets_lines_now_and_then(kitae, adapter, tmp_path, monkeypatch):
    said, clock = [], iter([0.0, 1.0, 20.0, 21.0, 40.0])
    lines = _Lines(said.append, clock=lambda: next(clock))
    lines.begin(4 << 30)
    for _ in range(4):
        lines.say(1 << 30)
    assert said == ["2.0 of 4.0 GiB, 102 MiB/s, 0 minutes left", "4.0 of 4.0 GiB, 102 MiB/s, 0 minutes left"]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert kitae("export", "merge", adapter, "--output", tmp_path / "out")[0] == 0
