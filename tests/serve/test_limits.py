"""What is refused, and how: tokens, sizes, ranges, broken bodies, slow and vanishing clients, a full queue."""

import json
import random
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
from serving import KEY, Running, raw, wait_for

from kitae.data.chat import Template

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY + "x", "\u00e9" * 10, "x" * 40_000])
def test_every_path_but_health_needs_the_token(running, key):
    header = None if key is None else f"Bearer {key}".encode()
    for method, path in [("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", CHAT), ("POST", TEXT),
                         ("GET", "/metrics"), ("GET", "/nothing"), ("GET", f"/v1/models?key={KEY}")]:  # fmt: skip
        line = b"" if header is None else b"Authorization: " + header + b"\r\n"
        status = raw(
            running, f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n".encode() + line + b"\r\n"
        )
        assert status == 401, (method, path, status)
    assert running.ask("GET", "/health", key=None)[0] == 200


def test_an_address_with_a_slash_at_its_end_is_the_same_one(running):
    assert running.ask("GET", "//v1/models")[0] == 200
    assert running.ask("GET", "//v1/models", key=None)[0] == 401


def test_unknown_paths_and_methods_have_openai_s_form(running):
    status, _, content = running.ask("GET", "/v1/embeddings")
    assert status == 404 and "there is nothing at /v1/embeddings" in json.loads(content)["error"]["message"]
    assert running.ask("GET", CHAT)[0] == 405


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "has to be a JSON object"),
        (b'{"messages": "\xff\xfe"}', "not UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 50_000, "not valid JSON"),
        (b'{"temperature": NaN, "messages": []}', "NaN is not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"{}", "messages: field required"),
    ],
)
def test_a_broken_body_is_refused_and_says_why(running, body, said):
    status, error = running.refused(CHAT, body)
    assert status == 400 and said in error["message"], error


VALUES = [
    float("inf"),
    -1,
    -1e-9,
    0,
    1.5,
    3,
    2**63,
    1e308,
    "1",
    "",
    [],
    {},
    True,
    [""],
    ["x"] * 17,
    ["x" * 257],
    [1],
    "x" * 300,
]
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size", "n", "seed", "stop",
          "stream", "stream_options", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "messages",
          "model", "chat_template_kwargs", "reasoning_format", "logit_bias", "tools", "frequency_penalty",
          "response_format")  # fmt: skip


def test_no_value_of_any_field_brings_the_server_down(running, client):
    """Every combination is answered, with 200 or an error of the client's, and the engine works afterwards."""
    for field in FIELDS:
        for value in VALUES:
            body = {"messages": HELLO, "max_tokens": 2, field: value}
            text = json.dumps(body).replace("Infinity", "1e999")
            status, _, content = running.ask("POST", CHAT, text.encode())
            assert status in (200, 400, 404), (field, value, status, content)
            if status != 200:
                assert field.split("_")[0] in content.decode() or "max_tokens" in content.decode(), (
                    field,
                    value,
                    content,
                )
    assert (
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).usage.completion_tokens
        <= 2
    )


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        (
            {"frequency_penalty": 0.5},
            "frequency_penalty",
            "not offered by this server; use repetition_penalty",
        ),
        ({"presence_penalty": 1}, "presence_penalty", "not offered by this server"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "messages[0].content[0].type",
            "text",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "input should be"),
        (
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "chat_template_kwargs.chat_template",
            "unknown field",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs",
            "has no switch for thinking",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"stop": ["a", ""]}, "stop", "0 characters"),
    ],
)
def test_a_wrong_field_is_named(running, change, param, said):
    status, error = running.refused(CHAT, {"messages": HELLO, "max_tokens": 2} | change)
    assert status == 400 and said in error["message"], error
    assert param is None or error["param"] == param


def test_fields_that_ask_for_nothing_are_accepted(running):
    body = {"messages": HELLO, "max_tokens": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
            "user": "me", "metadata": {"a": "b"}, "tools": [], "response_format": {"type": "text"}, "store": False,
            "temperature": None, "stop": None}  # fmt: skip
    assert running.ask("POST", CHAT, body)[0] == 200


def test_a_prompt_beyond_the_context_is_refused_before_it_is_tokenised(running, monkeypatch):
    def tokenise(*_, **__):
        raise AssertionError("it was tokenised")

    with monkeypatch.context() as patched:
        patched.setattr(Template, "prompt", tokenise)
        status, error = running.refused(CHAT, {"messages": [{"role": "user", "content": "x" * 900_000}]})
    assert (status, error["code"]) == (400, "context_length_exceeded")
    status, error = running.refused(CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]})
    assert (status, error["code"]) == (400, "context_length_exceeded")
    status, error = running.refused(TEXT, {"prompt": [5] * 4000, "max_tokens": 97})
    assert "4,000 tokens and max_tokens is 97" in error["message"]
    for prompt, said in [
        ([], "prompt"),
        ("", "no tokens"),
        ([-1], "token id -1"),
        ([10**6], "token id 1000000"),
        ([[]], "no tok"),
    ]:
        status, error = running.refused(TEXT, {"prompt": prompt})
        assert status == 400 and said in error["message"], error


def test_a_body_that_is_too_large_is_refused_unread(running):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    assert raw(running, (head + "Content-Length: 200000000\r\n\r\n").encode()) == 413
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    assert raw(running, (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + chunk * 20) == 413
    status, error = running.refused(CHAT, {"messages": HELLO}, headers={"Content-Encoding": "gzip"})
    assert status == 415 and "Content-Encoding" in error["message"]


def test_endless_headers_are_refused(running):
    assert raw(running, b"GET /health HTTP/1.1\r\n" + b"X: " + b"y" * 200_000) == 400


def test_bytes_that_are_no_http_do_not_stop_it(running):
    numbers = random.Random(0)
    for _ in range(40):
        raw(running, numbers.randbytes(numbers.randrange(1, 400)), timeout_s=0.05)
    assert running.ask("GET", "/health", key=None)[0] == 200


def test_slow_heads_and_bodies_and_readers_lose_their_connection(thinker):
    from kitae.serve.http import TimedProtocol

    class Fast(TimedProtocol):
        head_timeout_s = 0.3
        write_timeout_s = 0.5

    server = Running(thinker, protocol=Fast, body_timeout_s=0.3)
    try:
        host, port = urlsplit(server.url).netloc.split(":")
        half_open = [socket.create_connection((host, int(port))) for _ in range(50)]
        for number, connection in enumerate(half_open):
            connection.sendall(b"" if number % 2 else b"GET /health HTTP/1.1\r\nX: ")
        began = time.monotonic()
        for connection in half_open:
            connection.settimeout(60)
            assert gone(connection)
            connection.close()
        assert time.monotonic() - began < 9  # one after the other they would take 15 s
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 50\r\n\r\n"
        assert raw(server, head.encode() + b"{") == 408
        # A reader that takes nothing: its rows are free again once its buffers are full.
        body = json.dumps(
            {
                "messages": HELLO,
                "stream": True,
                "n": 8,
                "max_tokens": 3900,
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": 20,
            }
        )
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((host, int(port)))
        reader.sendall(head.replace("50", str(len(body))).encode() + body.encode())
        assert wait_for(lambda: server.engine.num_running == 8)
        assert wait_for(lambda: server.engine.num_open == 0 and server.engine.num_running == 0)
        reader.close()
        assert server.ask("GET", "/health", key=None)[0] == 200
    finally:
        server.close()


def gone(connection):
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows_at_once(running, stream):
    host, port = urlsplit(running.url).netloc.split(":")
    ask = {"messages": HELLO, "stream": stream, "n": 4, "max_tokens": 3000, "temperature": 0}
    body = json.dumps(ask)  # greedy, this model repeats itself and never ends
    for _ in range(3):
        connection = socket.create_connection((host, int(port)))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body.encode())
        assert wait_for(lambda: running.engine.num_running == 4)
        requests = list(running.engine._tickets)
        connection.close()
        assert wait_for(lambda: running.engine.num_running == 0 and running.engine.num_open == 0)
        assert [request.finish_reason for request in requests] == ["cancelled"] * 4, (
            "none of them ended by itself"
        )


def test_a_full_queue_is_429_and_the_rest_is_unharmed(thinker, monkeypatch):
    """No token comes before 20 of 30 requests were refused, so that 8 rows and a queue of 2 are full."""
    from kitae.rollout.generic import PackedRows

    whole, refused = PackedRows.advance, threading.Event()

    def advance(self, *args, **kwargs):
        assert refused.wait(60)
        return whole(self, *args, **kwargs)

    server = Running(thinker, max_queue=2)
    try:
        ask = {"model": "tiny", "messages": HELLO, "max_tokens": 150, "temperature": 0}
        alone = server.client().chat.completions.create(**ask).choices[0].message.content
        results = []
        monkeypatch.setattr(PackedRows, "advance", advance)

        def one():
            status, headers, content = server.ask("POST", CHAT, ask)
            results.append((status, headers, json.loads(content)))

        threads = [threading.Thread(target=one) for _ in range(30)]
        [thread.start() for thread in threads]
        assert wait_for(lambda: len(results) == 20)
        refused.set()
        [thread.join() for thread in threads]
        accepted = [r for r in results if r[0] == 200]
        assert [r[0] for r in results] == [429] * 20 + [200] * 10
        assert all(r[2]["choices"][0]["message"]["content"] == alone for r in accepted)
        full = next(r for r in results if r[0] == 429)
        assert full[1]["retry-after"] == "1" and full[2]["error"]["type"] == "rate_limit_error"
        assert server.refused(TEXT, {"prompt": ["a"] * 11, "max_tokens": 1})[0] == 400
    finally:
        server.close()


def test_an_answer_under_way_is_finished_when_the_server_ends(thinker):
    server = Running(thinker, grace_s=60)
    chunks = server.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=100, stream=True, temperature=0
    )
    first = next(iter(chunks))
    server.server.should_exit = True
    rest = list(chunks)
    server.close()
    assert rest[-1].choices[0].finish_reason in ("stop", "length") and first.choices[0].delta.content == ""


def test_an_engine_that_fails_on_a_request_goes_on_with_the_next(running, client, monkeypatch):
    from kitae.errors import NonFiniteError
    from kitae.rollout.generic import PackedRows

    whole = PackedRows.advance

    def failing(self, scheduler, **kwargs):
        if any(len(r.token_ids) >= 3 for r in scheduler.running):
            raise NonFiniteError("the model's logits are not finite")
        return whole(self, scheduler, **kwargs)

    monkeypatch.setattr(PackedRows, "advance", failing)
    ask = {"model": "tiny", "messages": HELLO, "temperature": 0}
    status, error = running.refused(CHAT, {**ask, "max_tokens": 50})
    assert status == 500 and "not finite" in error["message"]
    _, _, content = running.ask("POST", CHAT, {**ask, "max_tokens": 50, "stream": True})
    *_, last, done = content.decode().strip().split("\n\n")
    assert (
        "not finite" in json.loads(last.removeprefix("data: "))["error"]["message"] and done == "data: [DONE]"
    )
    monkeypatch.undo()
    assert client.chat.completions.create(**ask, max_tokens=10).usage.completion_tokens == 10
    assert running.engine.num_open == 0


def test_an_engine_that_cannot_go_on_tells_every_request(thinker, monkeypatch):
    from dataclasses import replace

    from kitae.rollout.generic import PackedRows

    server = Running(thinker)
    try:

        def failing(*_, **__):
            raise MemoryError("no room")

        monkeypatch.setattr(PackedRows, "advance", failing)
        lane = server.engine.lanes["tiny"]
        server.engine.lanes["tiny"] = replace(lane, open_session=failing)
        for _ in range(2):
            status, error = server.refused(CHAT, {"messages": HELLO, "max_tokens": 5})
            assert status == 500 and "its log says why" in error["message"]
            assert wait_for(lambda: not server.engine.is_alive)
        assert server.ask("GET", "/health", key=None)[0] == 503 and server.engine.num_open == 0
    finally:
        server.close()


def test_metrics_count_requests_and_tokens(running, client):
    def number(name):
        _, _, content = running.ask("GET", "/metrics")
        return next(
            float(line.split()[-1]) for line in content.decode().splitlines() if line.startswith(name)
        )

    requests = 'kitae_requests_total{path="/v1/chat/completions",status="200"}'
    before = number(requests), number("kitae_completion_tokens_total")
    client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=7, temperature=0)
    assert (number(requests), number("kitae_completion_tokens_total")) == (before[0] + 1, before[1] + 7)
    assert number("kitae_completions_waiting") == 0


def test_a_request_that_memory_has_no_room_for_is_refused_and_others_go_on(thinker, kernels):
    server = Running(thinker, engine="native", use={"kv_cache_tokens": 64})
    try:
        assert server.engine.most_tokens == 64
        status, error = server.refused(TEXT, {"prompt": [5] * 40, "max_tokens": 26})
        assert status == 400
        assert "keys and values of 64 tokens fit: kv_cache_tokens is 64; raise that" in error["message"]
        body = {"prompt": [[5] * 20, [6] * 30, [7] * 39], "max_tokens": 25, "temperature": 0, "n": 2}
        status, _, content = server.ask("POST", TEXT, body)
        assert status == 200
        assert len(json.loads(content)["choices"]) == 6
        assert server.engine.num_open == 0
    finally:
        server.close()
