"""Small data files and a way to call the command line inside this process."""

import json

import pytest


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working folder with sums to teach and to ask, three subjects in turn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KITAE_HOME", str(tmp_path / "home"))

    def rows(name, make):
        (tmp_path / name).write_text("".join(json.dumps(make(i)) + "\n" for i in range(12)))

    rows(
        "sft.jsonl",
        lambda i: {"prompt": f"{i}+{i}", "completion": f"<think>x</think><answer>{2 * i}</answer>"},
    )
    rows("rl.jsonl", lambda i: {"prompt": f"{i}+{i}", "answer": f"{2 * i}", "level": f"L{i % 3}"})
    return tmp_path
