"""How often readers hear something: not at each of the engine's steps, and in few calls of the system."""

import asyncio

import pytest

pytest.importorskip("uvicorn")

from kitae.config import SamplingSettings
from kitae.rollout.base import make_requests
from kitae.rollout.session import Event
from kitae.serve import engine
from kitae.serve.http import GatheredWrites
from kitae.serve.lanes import Lane
from kitae.types import Problem


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(engine.time, "monotonic", lambda: Clock.now)
    return Clock


class Running:
    """A session as far as the pace depends on it."""

    num_running = 2


def grow(requests, *texts, finish_reason=None):
    """One step: a token for each request."""
    for request in requests:
        request.token_ids.append(7)
    return [Event(r, [7], text, finish_reason) for r, text in zip(requests, texts, strict=True)]


def test_the_first_and_the_last_text_come_at_once_and_the_rest_now_and_then(clock):
    lanes = [Lane(name=name, policy=None, open_session=Running) for name in ("a", "b")]
    thread = engine.EngineThread(lanes)
    problem = Problem(prompt="", token_ids=[1], index=0)
    first, second = make_requests(problem, [9, 9], number=0, sampling=SamplingSettings(), seed=0)

    def shown(lane, events):
        return [(e.request.sample_number, e.token_ids, e.text) for e in thread._gathered(lane, events)]

    assert shown("a", grow([first], "a")) == [(0, [7], "a")]
    clock.now += 0.01
    assert shown("a", grow([first, second], "b", "x")) == [(1, [7], "x")]  # the second one's first
    assert shown("a", grow([first, second], "c", "y")) == []
    clock.now += engine.SHOW_S
    assert shown("b", []) == []  # the other lane has a clock of its own
    assert shown("a", grow([first, second], "d", "z")) == [(0, [7] * 3, "bcd"), (1, [7] * 2, "yz")]
    assert shown("a", grow([first], "e")) == []
    clock.now += 0.01
    assert shown("a", grow([first], "f", finish_reason="stop")) == [(0, [7, 7], "ef")]
    assert shown("a", grow([second], "g")) == []
    clock.now += engine.SHOW_S
    assert shown("a", []) == [(1, [7], "g")]  # also of a row that gets no tokens now
    assert not any(thread._held.values())


def test_each_of_many_readers_hears_something_less_often(clock, monkeypatch):
    thread = engine.EngineThread([Lane(name="a", policy=None, open_session=Running)])
    problem = Problem(prompt="", token_ids=[1], index=0)
    (request,) = make_requests(problem, [99], number=0, sampling=SamplingSettings(), seed=0)
    for num_running, pause_s in ((25, 0.1), (64, 0.25), (128, 0.5)):
        monkeypatch.setattr(Running, "num_running", num_running)
        clock.now += 10
        thread._gathered("a", grow([request], "x"))
        clock.now += pause_s * 0.9
        assert not thread._gathered("a", grow([request], "y"))
        clock.now += pause_s * 0.2
        assert [e.text for e in thread._gathered("a", grow([request], "z"))] == ["yz"]


def test_what_is_written_in_one_turn_is_sent_at_once():
    class Transport:
        sent, is_closed = [], False

        def write(self, data):
            assert not self.is_closed
            self.sent.append(data)

        def close(self):
            self.is_closed = True

        def is_closing(self):
            return self.is_closed

    async def talk():
        transport = Transport()
        writes = GatheredWrites(transport, asyncio.get_running_loop())
        writes.write(b"head ")
        writes.write(b"first")
        assert transport.sent == []
        await asyncio.sleep(0)
        assert transport.sent == [b"head first"]
        writes.write(b"last")
        writes.close()
        assert transport.sent == [b"head first", b"last"] and writes.is_closing()
        writes.write(b"too late")
        await asyncio.sleep(0)
        assert len(transport.sent) == 2

    asyncio.run(talk())
