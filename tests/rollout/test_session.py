"""Sessions of both engines: requests with settings of their own, added and cancelled while others run."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kitae.config import ModelSettings, SamplingSettings, SeamSettings
from kitae.errors import ConfigError
from kitae.models.load import load_policy
from kitae.models.policy import Policy
from kitae.rollout.base import Request
from kitae.rollout.generic import GenericEngine
from kitae.rollout.native import NativeEngine
from kitae.rollout.paged import PagedEngine
from kitae.rollout.session import Session, SessionEngine
from kitae.types import Problem

STOP = 2
KINDS = ["generic", "plain", "native", "paged"]
EngineOf = Callable[..., SessionEngine]
SETTINGS = [
    SamplingSettings(temperature=0),
    SamplingSettings(temperature=0.8),
    SamplingSettings(temperature=1.2, top_p=0.8),
    SamplingSettings(top_k=7, min_p=0.01),
    SamplingSettings(temperature=0, repetition_penalty=1.3, no_repeat_ngram_size=2),
    SamplingSettings(temperature=0.9, stop=["1 4", "77"]),
]


def spell(ids: list[int]) -> str:
    return "".join(f"{i} " for i in ids)


@pytest.fixture
def engine_of(tiny: Callable[..., Path], kernels: ctypes.CDLL) -> EngineOf:
    def make(kind: str, *, max_rows: int = 8) -> SessionEngine:
        folder = tiny("qwen3", initializer_range=0.2, max_position_embeddings=256)
        settings = ModelSettings(
            name_or_path=str(folder),
            dtype="float32",
            device="cpu",
            seams=SeamSettings(attention=kind != "plain"),
        )
        policy: Policy = load_policy(settings, trainable=False)
        how: dict[str, Any] = {"stop_ids": (STOP,), "decode": spell, "max_rows": max_rows}
        if kind == "native":
            return NativeEngine(policy, kernels=kernels, **how)
        return PagedEngine(policy, **how) if kind == "paged" else GenericEngine(policy, **how)

    return make


def problem_of(length: int) -> Problem:
    numbers = torch.Generator().manual_seed(length)
    return Problem(prompt="", token_ids=torch.randint(3, 100, (length,), generator=numbers).tolist())


def run(session: Session, *, most: int = 1000) -> dict[Request, str]:
    """Step until nothing runs; the text each request's events brought."""
    texts: dict[Request, str] = {}
    for _ in range(most):
        if session.is_idle:
            return texts
        for event in session.step():
            texts[event.request] = texts.get(event.request, "") + event.text
            assert event.token_ids == event.request.token_ids[-len(event.token_ids) :]
            assert event.finish_reason == event.request.finish_reason
    raise AssertionError("it does not end")


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_gets_what_it_gets_alone_whatever_is_added_and_cancelled_beside_it(
    kind: str, engine_of: EngineOf
):
    engine = engine_of(kind, max_rows=5)
    asked = [(problem_of(3 + 9 * i), SETTINGS[i % len(SETTINGS)], i) for i in range(8)]

    def add(session: Session, which: int) -> list[Request]:
        problem, sampling, seed = asked[which]
        return session.add(problem, limits=[20, 9], sampling=sampling, seed=seed, wants_text=True)

    def result(requests: list[Request]) -> list[Any]:
        return [(r.token_ids, r.kept_ids, r.finish_reason) for r in requests]

    alone: list[Any] = []
    for which in range(len(asked)):
        session = engine.open_session()
        requests = add(session, which)
        texts = run(session)
        alone.append((result(requests), [texts[r] for r in requests], [r.logprobs for r in requests]))
    numbers = random.Random(1)
    for _ in range(4):
        session = engine.open_session()
        texts: dict[Request, str] = {}
        kept: dict[int, list[Request]] = {}
        for which in numbers.sample(range(len(asked)), len(asked)):
            kept[which] = add(session, which)
            victim = add(session, numbers.randrange(len(asked)))
            for _ in range(numbers.randrange(3)):
                for event in session.step(within_s=0.001):
                    texts[event.request] = texts.get(event.request, "") + event.text
            for request in victim:
                session.cancel(request)
            counts = [len(r.token_ids) for r in victim]
            for event in session.step():
                assert event.request not in victim
                texts[event.request] = texts.get(event.request, "") + event.text
            assert [len(r.token_ids) for r in victim] == counts
        for request, text in run(session).items():
            texts[request] = texts.get(request, "") + text
        assert session.num_running == session.num_waiting == 0
        for which, requests in kept.items():
            expected, expected_texts, expected_logprobs = alone[which]
            assert result(requests) == expected
            assert [texts[r] for r in requests] == expected_texts
            for r, own in zip(requests, expected_logprobs, strict=True):
                assert r.logprobs == (own if kind == "native" else pytest.approx(own, abs=1e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_that_spans_tokens_ends_a_completion(kind: str, engine_of: EngineOf):
    engine = engine_of(kind)
    sampling = SamplingSettings(temperature=0, max_new_tokens=30)
    ((whole,),) = engine.generate([problem_of(6)], n=1, sampling=sampling, seed=0)
    third, fourth = whole.token_ids[3:5]
    stop = f"{str(third)[-1]} {str(fourth)[0]}"  # the end of one token and the beginning of the next
    sampling = sampling.model_copy(update={"stop": ["never", stop]})
    ((cut,),) = engine.generate([problem_of(6)], n=1, sampling=sampling, seed=0)
    assert cut.finish_reason == "stop"
    assert stop in spell(cut.token_ids)
    assert stop not in spell(cut.token_ids[:-1])
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) <= 5
    assert cut.text == spell(whole.token_ids).split(stop)[0]
    assert len(cut.logprobs) == len(cut.token_ids)


@pytest.mark.parametrize("kind", ["generic", "native"])
def test_the_likeliest_tokens_come_with_each_token(kind: str, engine_of: EngineOf):
    engine = engine_of(kind)
    session = engine.open_session()
    greedy, cold, few = (
        session.add(problem_of(9), limits=[6], sampling=s, num_top_logprobs=4)[0]
        for s in (
            SamplingSettings(temperature=0),
            SamplingSettings(temperature=0.5),
            SamplingSettings(top_k=2),
        )
    )
    plain = session.add(problem_of(9), limits=[6], sampling=SamplingSettings(temperature=0))[0]
    run(session)
    assert plain.token_ids == greedy.token_ids
    assert not plain.top_logprobs
    assert [next(iter(top)) for top in greedy.top_logprobs] == greedy.token_ids
    assert [len(top) for top in few.top_logprobs] == [2] * len(few.token_ids)
    for request in (greedy, cold, few):
        assert len(request.top_logprobs) == len(request.token_ids)
        for token, logprob, top in zip(
            request.token_ids, request.logprobs, request.top_logprobs, strict=True
        ):
            assert list(top.values()) == sorted(top.values(), reverse=True)
            if token in top:
                assert top[token] == pytest.approx(logprob, abs=1e-5)
    # At half the temperature log-probabilities are twice as far apart.
    a, b = (list(r.top_logprobs[0].values()) for r in (greedy, cold))
    assert b[0] - b[1] == pytest.approx(2 * (a[0] - a[1]), abs=1e-4)


@pytest.mark.parametrize("kind", ["generic", "native"])
def test_what_cannot_run_is_refused_and_the_rest_goes_on(kind: str, engine_of: EngineOf):
    session = engine_of(kind).open_session()
    request = session.add(problem_of(5), limits=[3], sampling=SamplingSettings())[0]
    with pytest.raises(ConfigError, match="context is 256"):
        session.add(problem_of(250), limits=[3, 7], sampling=SamplingSettings())
    run(session)
    assert request.finish_reason in ("stop", "length")
    assert session.step() == []


def test_a_cancelled_request_that_waited_never_runs(engine_of: EngineOf):
    session = engine_of("generic", max_rows=1).open_session()
    first, second, third = (
        session.add(problem_of(4), limits=[3], sampling=SamplingSettings(), seed=i)[0] for i in range(3)
    )
    session.step()
    session.cancel(second)
    assert (session.num_running, session.num_waiting) == (1, 1)
    run(session)
    assert second.token_ids == []
    assert second.finish_reason == "cancelled"
    assert first.token_ids and third.token_ids
    session.cancel(first)
    assert first.finish_reason != "cancelled"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="an empty string is in every text"):
        SamplingSettings(stop=["end", ""])
