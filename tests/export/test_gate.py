"""An export is checked before it gets its name: killed there it goes on, failed it is .rejected, the earlier one stays."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal

import pytest

from kitae.cli.main import main
from kitae.export import gguf_file, shards
from kitae.export import verify as gate
from tests.export.test_merge import kitae_adapter
from tests.export.test_resume import killed_before_call

pytest.importorskip("gguf")
MADE = {
    "merge": ["merge", "adapter"],
    "bf16-to-fp8": ["bf16-to-fp8", "base"],
    "fp8-to-bf16": ["fp8-to-bf16", "fp8"],
    "gguf": ["gguf", "adapter", "--type", "q8_0"],
    "adapter": ["gguf", "adapter", "--adapter_only"],
    "quantizer": ["gguf", "base", "--type", "q3_k_m"],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A base, an adapter on it, the base in FP8, and what stands in for llama-quantize."""
    from kitae.models.toy import make_model

    folder = tmp_path_factory.mktemp("sources")
    make_model(folder / "base", "llama")
    kitae_adapter(folder / "base", folder / "adapter")
    assert main(["export", "bf16-to-fp8", str(folder / "base"), "--output", str(folder / "fp8")]) == 0
    tool = folder / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho run >> "$0.log"\n/bin/cp "$1" "$2"\n')
    tool.chmod(0o755)
    return folder


@pytest.fixture
def export(sources, tmp_path, monkeypatch):
    """Run one of MADE; where it goes is tmp_path / out."""
    monkeypatch.setenv("PATH", str(sources / "bin"), prepend=os.pathsep)

    def run(kind, *more):
        verb, model, *rest = MADE[kind]
        return main(["export", verb, str(sources / model), *rest, "--output", str(tmp_path / "out"), *more])

    return run


def bytes_of(path):
    if path.is_file():
        return path.read_bytes()
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name not in (shards.MANIFEST, "lock")}


def inodes(folder):
    return {
        p.name: p.stat().st_ino for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "out"
    }


def killed(action):
    """Run `action` in a forked process; whether it died of kill -9."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == signal.SIGKILL
    try:
        action()
    finally:
        os._exit(0)


def kill_self(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def fail_the_check(monkeypatch):
    real = gate.verify

    def fail(*args, **options):
        report = real(*args, **options)
        report["rows"][-1]["failures"].append("it talks gibberish")
        return {**report, "passed": False}

    monkeypatch.setattr(gate, "verify", fail)


@pytest.mark.parametrize("kind", MADE)
def test_killed_in_the_check_it_keeps_the_earlier_one_and_goes_on_with_the_check(
    kind, export, sources, tmp_path, monkeypatch
):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    assert export(kind, "--no_verify") == 0  # an earlier export, of another identity below
    if out.is_dir():
        (out / shards.MANIFEST).unlink()
    before = bytes_of(out)
    with monkeypatch.context() as patch:
        patch.setattr(gate, "verify", kill_self)
        assert killed(lambda: export(kind, "--overwrite", "--num_workers", "1"))
    assert bytes_of(out) == before
    written = inodes(partial)
    assert written
    runs = sources / "bin" / "llama-quantize.log"
    count = runs.read_text() if runs.exists() else ""
    assert export(kind, "--overwrite", "--num_workers", "1", "--json", str(sources / "report.json")) == 0
    assert json.loads((sources / "report.json").read_text())["verify"]["passed"]
    assert not partial.exists()
    assert inodes(out if out.is_dir() else tmp_path) == written  # nothing was written anew
    assert (runs.read_text() if runs.exists() else "") == count
    report = out / "kitae_verify.json" if out.is_dir() else tmp_path / "out.verify.json"
    saved = json.loads(report.read_text())
    assert saved["passed"] and saved["rows"][-1]["name"] == "out"


@pytest.mark.parametrize("kind", MADE)
def test_one_that_fails_is_rejected_and_the_earlier_one_stays(kind, export, tmp_path, monkeypatch, capsys):
    out, rejected = tmp_path / "out", tmp_path / "out.rejected"
    assert export(kind) == 0
    if out.is_dir():
        (out / shards.MANIFEST).unlink()
    beside = {path.name for path in tmp_path.iterdir()}
    before = bytes_of(out)
    fail_the_check(monkeypatch)
    for _ in range(2):
        assert export(kind, "--overwrite") == 3
        assert "out failed the gate: it talks gibberish; it is" in capsys.readouterr().err
        assert bytes_of(out) == before
        added = {path.name for path in tmp_path.iterdir()} - beside
        assert added == {"out.rejected"} | (set() if rejected.is_dir() else {"out.rejected.verify.json"})
        report = (
            rejected / "kitae_verify.json" if rejected.is_dir() else tmp_path / "out.rejected.verify.json"
        )
        assert not json.loads(report.read_text())["passed"]
        assert not rejected.is_dir() or not (rejected / "lock").exists()


def test_a_finished_export_that_fails_when_it_is_checked_again_loses_its_name(export, tmp_path, monkeypatch):
    assert export("merge") == 0 and export("merge") == 0
    fail_the_check(monkeypatch)
    assert export("merge") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
    assert not (tmp_path / "out.rejected" / "lock").exists()


@pytest.mark.parametrize("kind", ["merge", "gguf"])
def test_without_the_check_what_was_killed_in_it_gets_its_name_as_it_is(kind, export, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "verify", kill_self)
    assert killed(lambda: export(kind, "--num_workers", "1"))
    assert not (tmp_path / "out").exists()
    written = inodes(tmp_path / "out.partial")
    assert export(kind, "--no_verify") == 0
    out = tmp_path / "out"
    assert inodes(out if out.is_dir() else tmp_path) == written
    assert not (tmp_path / "out.verify.json").exists() and not (out / "kitae_verify.json").exists()


def test_an_interrupt_in_the_check_says_how_to_go_on(export, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gate, "verify", interrupted)
        assert export("gguf") == 130
    said = capsys.readouterr().err
    assert "out is whole, but was not checked; the same command does that" in said
    assert "goes on from there" in said and not (tmp_path / "out").exists()
    assert export("gguf") == 0


@pytest.mark.parametrize("kind", ["merge", "gguf"])
def test_killed_at_any_call_to_the_disk_nothing_unchecked_has_the_name(kind, export, tmp_path, monkeypatch):
    """With an earlier export there: its name always leads to it, or to the new one when that has passed."""
    checked = tmp_path / "checked"
    passed = {"command": "verify", "rows": [], "prompts": [], "positions": 0, "not_run": None, "passed": True}

    def verify(*_, **__):
        checked.touch()
        return passed

    monkeypatch.setattr(gate, "verify", verify)
    out = tmp_path / "out"
    assert export(kind) == 0
    whole = bytes_of(out)
    for number in itertools.count(1, 2):
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        out.write_bytes(b"the earlier one") if kind == "gguf" else out.mkdir()
        if kind == "merge":
            (out / "config.json").write_text("{}")
        earlier = bytes_of(out)
        checked.unlink(missing_ok=True)
        was_killed = killed_before_call(number, lambda: export(kind, "--overwrite", "--num_workers", "1"))
        if out.exists() and bytes_of(out) != earlier:
            assert checked.exists() and bytes_of(out) == whole
        if not out.exists():  # between the two renames of a folder
            assert bytes_of(tmp_path / ".del-out") == earlier and bytes_of(tmp_path / "out.partial") == whole
        assert export(kind, "--overwrite", "--num_workers", "1") == 0
        assert bytes_of(out) == whole and not (tmp_path / "out.partial").exists()
        if not was_killed:
            break
    assert number > 20


def test_a_file_is_written_under_its_partial_name_only(export, tmp_path, monkeypatch):
    seen = []
    real = gguf_file.gate.examine

    def examine(check, written, output):
        seen.append((written.relative_to(tmp_path), output.exists()))
        return real(check, written, output)

    monkeypatch.setattr(gguf_file.gate, "examine", examine)
    assert export("gguf") == 0
    assert [(str(path), exists) for path, exists in seen] == [("out.partial/out", False)]
