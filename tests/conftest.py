"""Fixtures shared by all tests: tiny models made on the fly, and the real data where it is present."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: more threads would only wait for each other
os.environ["COLUMNS"] = "80"  # tables are as wide in every terminal
os.environ["no_proxy"] = "*"  # the only servers are on loopback

with contextlib.suppress(ModuleNotFoundError):  # those of a GPU need none
    import hypothesis

    # The same examples in every run, however slow the machine is; others come with --hypothesis-profile=default.
    hypothesis.settings.register_profile(
        "repeatable",
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
FAMILIES = ["qwen3", "llama", "deepseek_v3"]


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory):
    """Pointers to runs go to a folder of this session, not to the user's ~/.kitae."""
    before = os.environ.get("KITAE_HOME")
    os.environ["KITAE_HOME"] = str(tmp_path_factory.mktemp("kitae-home"))
    yield
    if before is None:
        del os.environ["KITAE_HOME"]
    else:
        os.environ["KITAE_HOME"] = before


@pytest.fixture(autouse=True, scope="session")
def heard_signals():
    """A process in the background may ignore Ctrl-C and a closed terminal; those that tests start shall hear of both.

    What starts anew gets a signal that is handled here in its default way, and one that is ignored stays ignored.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(autouse=True)
def same_numbers():
    """What a test draws without a seed of its own does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def kernels(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch):
    """The native engine's kernels, compiled once into pytest's own cache; without a compiler the test is skipped."""
    from kitae.rollout.build import BuildError, load_kernels

    monkeypatch.setenv("XDG_CACHE_HOME", str(pytestconfig.cache.mkdir("compiled")))
    try:
        return load_kernels()
    except BuildError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"the kernels must compile in CI: {error}")
        pytest.skip(f"no kernels: {error}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; tests that need it are skipped elsewhere, but must run in CI."""
    if not SHARED_DATA.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{SHARED_DATA} must be present in CI")
        pytest.skip(f"real data not present at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A function family -> folder of a tiny random model with the character tokenizer (made once a session)."""
    from kitae.models.toy import make_model, make_tokenizer

    made: dict[tuple, Path] = {}

    def make(family: str = "qwen3", *, prefill: str = "", strip_thinking: bool = False, **sizes) -> Path:
        key = (family, prefill, strip_thinking, *sorted(sizes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            tokenizer = make_tokenizer(prefill=prefill, strip_thinking=strip_thinking)
            made[key] = make_model(folder, family, tokenizer=tokenizer, **sizes)
        return made[key]

    return make


class FakeEndpoint:
    """An OpenAI-compatible server on loopback. `reply` says what it does with (number of the request, its body).

    It returns a text, a dict (the whole JSON), bytes (the body as it is), a function that writes the body, or (status,
    headers, body); it may sleep or raise ConnectionError, which breaks the connection off.
    """

    def __init__(self):
        self.reply = lambda number, body: "4"
        self.bodies, self.headers, self.paths = [], [], []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    number = len(fake.bodies)
                    fake.bodies.append(body)
                    fake.headers.append(dict(self.headers))
                    fake.paths.append(self.path)
                    fake.under_way += 1
                    fake.most_under_way = max(fake.most_under_way, fake.under_way)
                try:
                    found = fake.reply(number, body)
                except ConnectionError:
                    self.connection.close()
                    return
                finally:
                    with fake._lock:
                        fake.under_way -= 1
                status, headers, content = found if isinstance(found, tuple) else (200, {}, found)
                if isinstance(content, str):
                    message = {"role": "assistant", "content": content}
                    content = {
                        "choices": [{"message": message, "finish_reason": "stop"}],
                        "usage": {"completion_tokens": len(content)},
                    }
                if callable(content):
                    self.send_response(status)
                    self.end_headers()
                    content(self.wfile)
                    return
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client has gone

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def endpoint():
    """A server that answers chat completions as the test says."""
    server = FakeEndpoint()
    yield server
    server.close()


@pytest.fixture
def kitae(capsys):
    """Run a command line: its exit code, standard output and standard error."""

    from kitae.cli.main import main

    def run(*argv):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run
