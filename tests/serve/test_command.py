"""kitae serve as a process: token, ready line and file, signals, a taken port."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from test_adapters import make_adapter

from kitae.cli.main import main
from kitae.cli.serve import name_of
from kitae.serve.access import Gate, new_key, read_key, write_private


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KITAE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "serve"


def test_it_says_when_it_is_ready_guards_its_token_and_ends_cleanly(tiny, home, tmp_path):
    words = [
        "serve",
        str(tiny()),
        "--port",
        "0",
        "--engine",
        "generic",
        "--ready_file",
        str(tmp_path / "ready.json"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "kitae", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.umask(0),
    )
    try:
        ready = json.loads(process.stdout.readline())
        assert json.loads((tmp_path / "ready.json").read_text()) == ready
        assert ready["url"].startswith("http://127.0.0.1:") and len(ready["models"]) == 1
        file = home / f"{ready['url'].rpartition(':')[2]}.token"
        assert str(file) == ready["api_key_file"]
        assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(home.stat().st_mode) == 0o700
        key = read_key(file)
        request = urllib.request.Request(
            f"{ready['url']}/v1/models", headers={"Authorization": f"Bearer {key}"}
        )
        with urllib.request.urlopen(request) as response:
            assert json.load(response)["data"][0]["id"] == ready["models"][0]
        assert key not in Path(f"/proc/{process.pid}/cmdline").read_text()
        port = ready["url"].rpartition(":")[2]
        assert main(["serve", str(tiny()), "--port", port]) == 69
    finally:
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "") and key not in errors
    assert not file.exists() and not (tmp_path / "ready.json").exists()


def test_a_key_file_that_others_can_read_is_refused(home, tmp_path, capsys):
    file = tmp_path / "key"
    file.write_text("secret\n")
    file.chmod(0o644)
    assert main(["serve", "m", "--port", "0", "--api_key_file", str(file)]) == 2
    assert f"run: chmod 600 {file}" in capsys.readouterr().err
    file.chmod(0o600)
    assert read_key(file) == "secret"
    file.write_text("\u00e9\n", encoding="utf-8")
    assert main(["serve", "m", "--port", "0", "--api_key_file", str(file)]) == 2
    assert "characters that a header cannot carry" in capsys.readouterr().err


def test_a_key_file_that_is_not_there_says_what_to_do(home, tmp_path, capsys):
    assert main(["serve", "m", "--port", "0", "--api_key_file", str(tmp_path / "key")]) == 2
    assert "write a token into it, or leave the flag out" in capsys.readouterr().err


def test_requests_call_a_model_by_the_last_part_of_its_path(tmp_path, monkeypatch):
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path / "my model")
    assert [name_of(path) for path in (".", "..", "./", "a/b/", "b.gguf", "org/name")] == [
        "my model", tmp_path.name, "my model", "b", "b", "name",
    ]  # fmt: skip


def test_an_adapter_of_another_family_is_refused_though_its_shapes_fit(home, tiny, tmp_path, capsys):
    adapter = make_adapter(tiny("llama"), tmp_path / "adapter", seed=1)
    assert main(["serve", str(tiny("qwen3")), "--adapter", f"x={adapter}", "--port", "0"]) == 2
    assert "of the family llama, and" in capsys.readouterr().err


def test_a_taken_port_is_found_before_anything_is_loaded(home, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "/no/such/model", "--port", str(taken.getsockname()[1])]) == 69
    assert "choose another --port" in capsys.readouterr().err


def test_what_is_private_is_written_through_nobody_s_link(tmp_path):
    (tmp_path / "other").write_text("keep")
    (tmp_path / f".x.json.{os.getpid()}").symlink_to(tmp_path / "other")
    write_private(tmp_path / "x.json", "secret")
    assert (tmp_path / "other").read_text() == "keep" and (tmp_path / "x.json").read_text() == "secret"
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o600


def test_the_gate_compares_bytes():
    gate = Gate("right")
    assert gate.admits(b"Bearer right") and gate.admits(b"bearer right")
    for wrong in (
        None,
        b"",
        b"right",
        b"Bearer",
        b"Bearer righ",
        b"Basic right",
        b"Bearer \xff\xfe",
        b"Bearer right x",
    ):
        assert not gate.admits(wrong), wrong
    assert len({new_key() for _ in range(100)}) == 100 and len(new_key()) >= 43


def test_help_needs_no_torch():
    code = "import sys; from kitae.cli.main import main; main(['serve', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
