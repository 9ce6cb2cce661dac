"""Engines in kitae's place: the commands they are started with, and the life of the process. Fakes stand in for them."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
import urllib.request

import pytest
from test_adapters import make_adapter

from kitae.cli.main import main

FAKE = """
    #!{python}
    import json, os, sys, http.server
    words = sys.argv
    port = int(words[words.index("--port") + 1])
    with open({record!r}, "w") as file:
        json.dump({{"argv": words, "key": os.environ.get("VLLM_API_KEY")}}, file)
    if os.path.exists({record!r} + ".fail"):
        sys.exit("out of memory")
    class Handler(http.server.BaseHTTPRequestHandler):
        asked = 0
        def do_GET(self):
            Handler.asked += 1
            self.send_response(503 if Handler.asked < 3 else 200)
            self.end_headers()
        def log_message(self, *_):
            pass
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a program on the PATH that writes down how it was started and says it is healthy when asked a third time."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("KITAE_HOME", str(tmp_path / "home"))

    def install(name):
        record = tmp_path / f"{name}.json"
        program = folder / name
        program.write_text(textwrap.dedent(FAKE).lstrip().format(python=sys.executable, record=str(record)))
        program.chmod(0o755)
        return record

    return install


def serve(tmp_path, *words):
    """Start kitae serve, wait until it says it is ready, stop it; its exit code and ready line."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "kitae",
            "serve",
            *map(str, words),
            "--port",
            "0",
            "--api_key",
            "secret-of-the-test",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    if line:
        ready = json.loads(line)
        with urllib.request.urlopen(f"{ready['url']}/health") as response:
            assert response.status == 200
        assert (
            json.loads((tmp_path / "home" / "serve" / f"{ready['url'].rpartition(':')[2]}.json").read_text())
            == ready
        )
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    return process.returncode, json.loads(line) if line else None, errors


def after(words, flag):
    return words[words.index(flag) + 1]


def test_vllm_gets_template_adapters_token_and_devices(fake, tiny, tmp_path):
    record = fake("vllm")
    model = tiny("qwen3", prefill="<think>\n")
    adapter = make_adapter(model, tmp_path / "mine", seed=1)
    code, ready, errors = serve(
        tmp_path, model, "--engine", "vllm", "--served_model_name", "base", "--adapter", f"mine={adapter}",
        "--system_prompt", "Think 'first'.", "--reasoning_format", "split", "--engine_args=--seed=1",
    )  # fmt: skip
    assert code == 0, errors
    started = json.loads(record.read_text())
    words = started["argv"]
    assert words[1:3] == ["serve", str(model)] and after(words, "--served-model-name") == "base"
    assert started["key"] == "secret-of-the-test" and "secret-of-the-test" not in words
    assert after(words, "--lora-modules") == f"mine={adapter}" and after(words, "--max-lora-rank") == "8"
    assert (
        after(words, "--reasoning-parser") == "deepseek_r1" and after(words, "--tensor-parallel-size") == "1"
    )
    assert words[-1] == "--seed=1"
    assert ready["models"] == ["base", "mine"]
    assert " serve " in errors and "secret-of-the-test" not in errors
    assert list((tmp_path / "home" / "serve").iterdir()) == []  # nothing is left behind


def test_the_template_handed_over_renders_as_kitae_s_own_does(tiny):
    from kitae.config import DataSettings, ModelSettings
    from kitae.data.chat import Template
    from kitae.models.load import load_tokenizer
    from kitae.serve.external import template_with_system

    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(tiny("qwen3", prefill="<think>\n"))))
    said = "Say \"yes\" or 'no'.\n\u00c9crivez peu \U0001f642 {% raw %} \\n"
    template = Template.load(tokenizer, data=DataSettings(system_prompt=said))
    text = template_with_system(template.text, template.system_prompt)
    asked = [{"role": "user", "content": "2+2"}]
    assert said in tokenizer.apply_chat_template(asked, chat_template=text, tokenize=False)
    for messages in (
        [{"role": "user", "content": "2+2"}],
        [{"role": "system", "content": "x"}, {"role": "user", "content": "2"}],
    ):
        shown = tokenizer.apply_chat_template(
            messages, chat_template=text, tokenize=False, add_generation_prompt=True
        )
        assert template.prompt(messages)[0] == tokenizer.encode(shown)
    assert template_with_system(template.text, None) == template.text


def test_sglang_reads_its_token_from_a_private_file(fake, tiny, tmp_path):
    record = fake("sglang")
    script = (
        (tmp_path / "bin" / "sglang")
        .read_text()
        .replace(
            "json.dump({",
            'c = words[words.index("--config") + 1]; json.dump({"config": open(c).read(), "mode": os.stat(c).st_mode, ',
        )
    )
    (tmp_path / "bin" / "sglang").write_text(script)
    code, _, errors = serve(tmp_path, tiny("deepseek_v3"), "--engine", "sglang", "--max_model_len", 256)
    assert code == 0, errors
    kept = json.loads(record.read_text())
    assert kept["config"] == 'api-key: "secret-of-the-test"\n' and stat.S_IMODE(kept["mode"]) == 0o600
    assert after(kept["argv"], "--context-length") == "256" and after(kept["argv"], "--tp") == "1"
    assert "secret-of-the-test" not in kept["argv"]


def test_llama_cpp_gets_its_own_flags(fake, tmp_path):
    record = fake("llama-server")
    model = tmp_path / "m-Q4_K_M.gguf"
    model.write_bytes(b"GGUF")
    flags = {
        "--threads": "16",
        "--n-gpu-layers": "20",
        "--cache-type-k": "q8_0",
        "--cache-type-v": "q8_0",
        "--ctx-size": "512",
    }
    code, ready, errors = serve(
        tmp_path, model, "--engine", "llama.cpp", "--threads", 16, "--n-gpu-layers", 20, "--cache-type-k", "q8_0",
        "--cache-type-v", "q8_0", "--max_model_len", 512,
    )  # fmt: skip
    assert code == 0, errors
    words = json.loads(record.read_text())["argv"]
    assert {flag: after(words, flag) for flag in flags} == flags
    assert after(words, "--alias") == "m-Q4_K_M" == ready["models"][0]
    assert after(words, "--reasoning-format") == "none" and after(words, "--parallel") == "64"


def test_an_engine_that_fails_to_start_is_reported(fake, tmp_path):
    record = fake("llama-server")
    record.with_suffix(".json.fail").touch()
    (tmp_path / "m.gguf").touch()
    began = time.monotonic()
    code, ready, errors = serve(tmp_path, tmp_path / "m.gguf", "--engine", "llama.cpp")
    assert (code, ready) == (2, None) and time.monotonic() - began < 100
    assert "llama-server ended by itself with exit code 1" in errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("m", "--engine", "sglang", "--temperature", "0.1"),
            "--temperature has no effect with --engine sglang",
        ),
        (
            ("m", "--engine", "vllm", "--cache_type_k", "q8_0"),
            "--cache_type_k has no effect with --engine vllm",
        ),
        (("m", "--engine", "llama.cpp"), "llama-server, which is not on the PATH; brew install llama.cpp"),
        (("m.gguf",), "m.gguf is a GGUF file, which llama.cpp runs: say --engine llama.cpp"),
        (("m", "--max_model_len", "5"), "--max_model_len has no effect with --engine auto"),
        (("m", "--adapter", "x"), "--adapter is 'x'; write NAME=PATH"),
        (("m", "--adapter", "x=a", "x=b"), "--adapter names 'x' twice"),
        (("m", "--api_key", "a", "--api_key_file", "b"), "both set"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KITAE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert main(["serve", *words, "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_no_proxy_is_asked_whether_a_server_is_healthy(running, monkeypatch):
    from kitae.serve.external import answers

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert answers(running.url)


def test_a_model_is_spread_over_as_many_devices_as_divide_its_heads():
    from kitae.serve.external import tensor_parallel

    assert [tensor_parallel(devices, 28) for devices in (1, 2, 3, 4, 8)] == [1, 2, 2, 4, 7]
