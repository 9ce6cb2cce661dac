"""The HTTP engine against a server on loopback that is busy, slow, broken, or refuses."""

import contextlib
import email.utils
import json
import threading
import time

import pytest

from kitae.config import SamplingSettings
from kitae.errors import ConfigError, EndpointError
from kitae.rollout.base import request_seed
from kitae.rollout.endpoint import Endpoint, chat_url, is_loopback
from kitae.rollout.http import HttpEngine
from kitae.rollout.reply import as_text, parse
from kitae.types import Problem

SAMPLING = SamplingSettings(max_new_tokens=64, temperature=0.5)
KEY = "sk-very-secret-key"


def problems(count):
    return [Problem(prompt=f"{i}+{i}", token_ids=[], answer=str(2 * i), index=10 + i) for i in range(count)]


def engine_of(endpoint, *, concurrency=4, **how):
    how = {"timeout_s": 60.0, "retry_wait_s": 0.001, "max_attempts": 3, **how}
    asked = Endpoint(base_url=endpoint.url, model="teacher", **how)
    return HttpEngine(
        asked, messages_of=lambda p: [{"role": "user", "content": p.prompt}], concurrency=concurrency
    )


def ask(engine, *, sampling=SAMPLING):
    return engine.ask(problems(1)[0], 2, sampling=sampling, seed=5)


def completion(message, **choice):
    return {"choices": [{"message": message, "finish_reason": "stop", **choice}]}


def test_groups_come_in_the_order_of_problems_and_samples(endpoint):
    seeds = {}
    endpoint.reply = lambda number, body: seeds.setdefault(body["seed"], body["messages"][0]["content"])
    groups = engine_of(endpoint).generate(problems(3), n=2, sampling=SAMPLING, seed=5)
    assert [[r.text for r in group] for group in groups] == [["0+0"] * 2, ["1+1"] * 2, ["2+2"] * 2]
    assert [r.problem.index for group in groups for r in group] == [10, 10, 11, 11, 12, 12]
    assert [r.num_tokens for r in groups[0]] == [3, 3] and groups[0][0].token_ids == []
    assert set(seeds) == {request_seed(5, index, s) % 2**31 for index in (10, 11, 12) for s in (0, 1)}
    assert set(endpoint.paths) == {"/v1/chat/completions"}


def test_each_answer_is_told_as_soon_as_it_is_there(endpoint):
    told = {}
    groups = engine_of(endpoint).generate(
        problems(3), n=2, sampling=SAMPLING, seed=5, on_rollout=lambda p, s, r: told.setdefault((p, s), r)
    )
    assert told == {(p, s): rollout for p, group in enumerate(groups) for s, rollout in enumerate(group)}


def test_what_is_sent_is_what_the_settings_say(endpoint):
    engine = engine_of(
        endpoint, api_key=f" {KEY}\n", extra_body={"max_completion_tokens": 9, "max_tokens": None}
    )
    sampling = SAMPLING.model_copy(update={"top_k": 20, "stop": ["END"]})
    ask(engine, sampling=sampling)
    assert endpoint.bodies[0] == {
        "model": "teacher",
        "messages": [{"role": "user", "content": "0+0"}],
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 20,
        "stop": ["END"],
        "seed": request_seed(5, 10, 2) % 2**31,
    }
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
    with pytest.raises(ConfigError, match="no_repeat_ngram_size is 3"):
        ask(engine, sampling=sampling.model_copy(update={"no_repeat_ngram_size": 3}))


def test_no_more_than_concurrency_are_under_way(endpoint):
    together = threading.Barrier(3, timeout=30)

    def slow(number, body):
        together.wait()
        time.sleep(0.03)
        return "4"

    endpoint.reply = slow
    engine_of(endpoint, concurrency=3).generate(problems(9), n=1, sampling=SAMPLING, seed=0)
    assert endpoint.most_under_way == 3


def broken(number, body):
    raise ConnectionError


PASSING = {
    "busy": (429, {"Retry-After": "0"}, b'{"error": {"message": "slow down"}}'),
    "failing": (500, {}, b"oops"),
    "gateway": (502, {}, b""),
    "unavailable": (503, {}, b'{"detail": "loading"}'),
    "gateway timeout": (504, {}, b""),
    "garbage": b"<html>",
    "cut JSON": b'{"choices": [{"message": {"content": "4',
    "less than promised": (200, {"Content-Length": "1000"}, b'{"choices": []}'),
    "no choices": {"choices": []},
    "another shape": [1, 2],
    "an error inside": {"error": {"message": "upstream died"}},
    "nested too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("failure", [*PASSING, "a broken connection"])
def test_what_may_pass_is_tried_again(endpoint, failure, caplog):
    def reply(number, body):
        if number == 0:
            return broken(number, body) if failure == "a broken connection" else PASSING[failure]
        return "4"

    endpoint.reply = reply
    assert ask(engine_of(endpoint)).text == "4"
    [warning] = caplog.messages
    assert warning.startswith("problem 10, answer 2: ") and "attempt 1 of 3, the next in 0.0 s" in warning
    assert len(endpoint.bodies) == 2 and endpoint.bodies[0] == endpoint.bodies[1]


def test_an_answer_that_takes_too_long_is_tried_again(endpoint):
    gate = threading.Event()

    def reply(number, body):
        if number == 0:
            gate.wait(60)
        return "4"

    endpoint.reply = reply
    assert ask(engine_of(endpoint, timeout_s=2.0)).text == "4"
    gate.set()
    assert len(endpoint.bodies) == 2


def test_an_answer_that_drips_is_given_up_in_time(endpoint):
    """Each byte comes within the socket's limit; the whole answer does not."""

    def drip(file):
        with contextlib.suppress(OSError):
            for _ in range(3000):
                file.write(b" ")
                file.flush()
                time.sleep(0.02)

    endpoint.reply = lambda number, body: drip
    began = time.monotonic()
    with pytest.raises(EndpointError, match=r"no whole answer within timeout_s = 0\.2"):
        ask(engine_of(endpoint, timeout_s=0.2, max_attempts=2))
    assert time.monotonic() - began < 30


def test_attempts_end_and_the_error_says_what_happened_last(endpoint):
    endpoint.reply = lambda number, body: (503, {}, b'{"error": {"message": "no\\nworker"}}')
    with pytest.raises(
        EndpointError, match=r"failed 3 times for problem 10, answer 2: HTTP 503 .*: no worker$"
    ):
        ask(engine_of(endpoint))
    assert len(endpoint.bodies) == 3
    gone = Endpoint(base_url="http://127.0.0.1:9", model="m", max_attempts=2, retry_wait_s=0.0)
    with pytest.raises(EndpointError, match=r"failed 2 times .* cannot be reached"):
        ask(HttpEngine(gone, messages_of=lambda p: []))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 501])
def test_what_will_not_pass_is_an_error_at_once_with_the_servers_words(endpoint, status):
    said = json.dumps({"error": {"message": f"bad\x07 request, key {KEY}"}}).encode()
    endpoint.reply = lambda number, body: (status, {}, said)
    with pytest.raises(EndpointError) as caught:
        ask(engine_of(endpoint, api_key=KEY))
    message = str(caught.value)
    assert len(endpoint.bodies) == 1
    assert f"HTTP {status}" in message and "bad request, key ***" in message and KEY not in message
    assert "\n" not in message and "\x07" not in message


def test_retry_after_is_honoured_by_everyone_and_has_a_limit(endpoint):
    began = []

    def reply(number, body):
        began.append(time.monotonic())
        return (429, {"Retry-After": "0.3"}, b"") if number == 0 else "4"

    endpoint.reply = reply
    engine = engine_of(endpoint, concurrency=1)
    engine.generate(problems(2), n=1, sampling=SAMPLING, seed=0)
    assert began[1] - began[0] >= 0.3
    later = email.utils.formatdate(time.time() + 3600, usegmt=True)
    endpoint.reply = lambda number, body: (429, {"Retry-After": later}, b"quota")
    with pytest.raises(EndpointError, match=r"asks to be left alone for 3\d\d\d s \(HTTP 429 .*quota\)"):
        ask(engine)


def test_after_a_failure_nothing_is_begun_and_what_is_under_way_is_given(endpoint):
    gate = threading.Event()

    def reply(number, body):
        if body["messages"][0]["content"] == "1+1":
            return 400, {}, b"no"
        gate.wait(60)
        return "4"

    def asked(problem):
        try:
            return engine.ask(problem, 0, sampling=SAMPLING, seed=0)
        except EndpointError:
            threading.Timer(0.3, gate.set).start()
            raise

    endpoint.reply = reply
    engine = engine_of(endpoint, concurrency=2)
    given = []
    found = engine.each(problems(6), asked)
    with pytest.raises(EndpointError, match="HTTP 400"):
        given.extend(rollout.problem.prompt for rollout in found)
    assert given == ["0+0"] and len(endpoint.bodies) == 2


def test_a_redirect_is_refused_and_carries_no_key_away(endpoint):
    endpoint.reply = lambda number, body: (307, {"Location": f"{endpoint.url}/elsewhere"}, b"")
    with pytest.raises(EndpointError, match=r"HTTP 307 .*; it leads elsewhere"):
        ask(engine_of(endpoint, api_key=KEY))
    assert len(endpoint.bodies) == 1


def test_a_proxy_is_not_asked_for_this_machines_own_server(endpoint, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(engine_of(endpoint)).text == "4"
    assert (
        is_loopback("http://localhost:1/v1")
        and is_loopback("http://[::1]:1/")
        and is_loopback("http://127.1.2.3/")
    )
    assert not is_loopback("https://example.org/v1")


def test_separate_reasoning_becomes_one_text():
    assert as_text("4", "2+2\n") == "<think>\n2+2\n</think>\n\n4"
    assert as_text("2+2</think>4") == "<think>\n2+2</think>4"
    assert as_text("<think>2+2</think>4") == "<think>2+2</think>4"
    assert as_text(None, "2+2") == "<think>\n2+2\n</think>\n\n"
    assert as_text(None) == ""
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "2+2"}]},
        {"type": "text", "text": "4"},
    ]
    assert as_text(parts) == "<think>\n2+2\n</think>\n\n4"


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({}, "stop"),
        ({"finish_reason": "length"}, "length"),
        ({"finish_reason": "content_filter"}, "length"),
        ({"finish_reason": None}, "stop"),
    ],
)
def test_answers_that_were_cut_are_marked(choice, reason):
    content = completion({"content": "4", "reasoning_content": "2+2"}, **choice)
    reply = parse(json.dumps(content | {"usage": {"completion_tokens": 7}}).encode())
    assert (reply.text, reply.finish_reason, reply.num_tokens) == ("<think>\n2+2\n</think>\n\n4", reason, 7)
    assert parse(json.dumps(content | {"usage": None}).encode()).num_tokens is None


def test_addresses():
    for base in ("http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions"):
        assert chat_url(base) == "http://h:1/v1/chat/completions"
    for base in ("file:///etc/passwd", "h:1/v1", "http://", "http://h:x/", "ftp://h", "http://a b/"):
        with pytest.raises(ConfigError, match="base_url is"):
            chat_url(base)
    with pytest.raises(ConfigError, match="holds a name or password") as caught:
        chat_url("http://me:secret@h/v1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "  ", "sk-\u00e9", "sk-a\r\nX: y"])
def test_a_key_that_cannot_be_one_is_refused(key):
    with pytest.raises(ConfigError, match="API key") as caught:
        HttpEngine(Endpoint(base_url="http://h/v1", model="m", api_key=key), messages_of=lambda p: [])
    assert "sk-" not in str(caught.value)


def test_the_key_is_in_no_text_about_the_endpoint():
    assert KEY not in repr(Endpoint(base_url="http://h/v1", model="m", api_key=KEY))
