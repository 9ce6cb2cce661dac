"""A real server on loopback over a tiny model, and the clients that speak to it."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

KEY = "a-token-of-the-tests"


class Running:
    """A server in a thread of this process."""

    def __init__(
        self,
        model,
        *,
        adapters=None,
        protocol=None,
        grace_s=1,
        reasoning_format="inline",
        engine="generic",
        use=None,
        **limits,
    ):
        from kitae.cli._open import UseSettings, open_model
        from kitae.rollout.generic import GenericEngine
        from kitae.serve import address
        from kitae.serve import http as server
        from kitae.serve.access import Gate
        from kitae.serve.app import Limits, Service, make_app
        from kitae.serve.engine import EngineThread
        from kitae.serve.lanes import make_lanes

        self.use = UseSettings(model=str(model), engine=engine, batch_size=8, dtype="float32", **use or {})
        self.opened = opened = open_model(self.use, must_chat=False)
        how = {"stop_ids": opened.template.stop_ids, "decode": opened.template.decode, "max_rows": 8}
        lanes = make_lanes(
            opened.policy,
            opened.engine,
            name="tiny",
            adapters=adapters or {},
            generic=lambda: GenericEngine(opened.policy, **how),
        )
        self.engine = EngineThread(lanes)
        given = {
            "context": 4096,
            "max_new_tokens": 4000,
            "max_rows": 8,
            "max_queue": 64,
            "max_request_bytes": 1 << 20,
        }
        self.service = Service(
            self.engine,
            template=opened.template,
            defaults=self.use.sampling(),
            limits=Limits(vocabulary=opened.policy.config.vocab_size, **given | limits),
            reasoning_format=reasoning_format,
        )
        listener = address.bind("127.0.0.1", 0)
        self.url = address.url_of(listener)
        ready = threading.Event()
        self.server = server.make_server(
            make_app(self.service, gate=Gate(KEY)),
            grace_s=grace_s,
            on_ready=ready.set,
            on_end=self.service.drain,
            protocol=protocol or server.TimedProtocol,
        )
        self.engine.start()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[listener])))
        self._thread.start()
        assert ready.wait(60)

    def close(self):
        self.server.should_exit = True
        self._thread.join(60)
        self.engine.close()

    def client(self, *, strict=True):
        """The real client; a strict one refuses answers that do not have OpenAI's form."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, _strict_response_validation=strict
        )

    def aclient(self):
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True
        )

    def ask(self, method, path, body=None, *, key=KEY, headers=None):
        """A request by hand: status, headers, body; `body` may be bytes."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=120)
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
            own = {} if key is None else {"Authorization": f"Bearer {key}"}
            connection.request(method, path, data, own | (headers or {}))
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()

    def refused(self, path, body, **kwargs):
        """Status and error object of a request that is refused."""
        status, headers, content = self.ask("POST", path, body, **kwargs)
        return status, json.loads(content)["error"] | {"headers": headers}


def raw(running, data, *, timeout_s=60):
    """Send bytes and return the status of the answer, or None where none came."""
    host, port = urlsplit(running.url).netloc.split(":")
    with contextlib.closing(socket.create_connection((host, int(port)), timeout=timeout_s)) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        try:
            line = connection.recv(64)
        except OSError:
            return None
        return int(line.split()[1]) if line.startswith(b"HTTP/") else None


def wait_for(condition, *, timeout_s=60):
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()
