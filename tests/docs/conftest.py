"""Tiny models and rows of sums to run what the documentation shows."""

import json
from pathlib import Path

import pytest

from kitae.models.toy import make_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty working folder, with examples/ in it as in a clone, and a home of its own for run pointers."""
    monkeypatch.setenv("KITAE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.fixture
def rows_file(workspace):
    """A function (name, row maker, count) -> path of a JSONL file."""

    def write(name, make, count=8):
        path = workspace / name
        path.write_text("".join(json.dumps(make(i)) + "\n" for i in range(count)))
        return str(path)

    return write


@pytest.fixture(scope="session")
def identity_model(tmp_path_factory):
    """A tiny untrained model whose tokenizer knows every character of the identity rows."""
    files = sorted((ROOT / "examples" / "data").glob("identity-*.jsonl"))
    letters = {c for file in files for c in file.read_text(encoding="utf-8") if ord(c) > 126}
    tokenizer = make_tokenizer(extra="".join(sorted(letters)))
    # Large starting weights: with a frozen head, adapters can only be as sure of a token as the head lets them.
    return make_model(
        tmp_path_factory.mktemp("identity"), "qwen2", tokenizer=tokenizer, initializer_range=0.3
    )
