"""Beginnings that are computed once: the same bits as without, whatever is shared, kept and forgotten."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kitae.config import ModelSettings, SamplingSettings
from kitae.models.load import load_policy
from kitae.models.policy import Policy
from kitae.rollout import native
from kitae.rollout.base import Request
from kitae.rollout.native import NativeEngine, NativeRows
from kitae.rollout.prefixes import Prefixes
from kitae.rollout.session import Session
from kitae.types import Problem

Bits = tuple[list[int], list[float]]


@pytest.fixture(params=["qwen3", "deepseek_v3"])
def policy(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Policy:
    folder = tiny(request.param, initializer_range=0.2, max_position_embeddings=256)
    settings = ModelSettings(name_or_path=str(folder), dtype="float32", device="cpu")
    return load_policy(settings, trainable=False)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass over prompts had."""
    counts: list[int] = []
    forward = NativeRows._forward

    def counting(self: NativeRows, tokens: Any, wanted: torch.Tensor, *, at: int) -> None:
        counts.append(tokens.struct.count)
        forward(self, tokens, wanted, at=at)

    monkeypatch.setattr(NativeRows, "_forward", counting)
    return counts


def engine_of(policy: Policy, kernels: ctypes.CDLL) -> NativeEngine:
    return NativeEngine(
        policy, kernels=kernels, stop_ids=(), decode=lambda ids: " ".join(map(str, ids)), max_rows=8
    )


def add(session: Session, token_ids: list[int], *, length: int, n: int = 1) -> list[Request]:
    problem = Problem(prompt="", token_ids=token_ids, index=0)
    return session.add(problem, limits=[length] * n, sampling=SamplingSettings(temperature=0.8), seed=3)


def run(session: Session) -> None:
    while not session.is_idle:
        session.step(within_s=0.0)


def bits(requests: list[Request]) -> list[Bits]:
    return [(request.token_ids, request.logprobs) for request in requests]


def test_a_text_that_begins_as_one_before_is_computed_from_where_it_differs(
    policy: Policy, kernels: ctypes.CDLL, computed: list[int]
):
    session = engine_of(policy, kernels).open_session()
    shared = [3 + i % 50 for i in range(40)]
    (first,) = add(session, [*shared, 7, 8], length=30)
    run(session)
    computed.clear()
    add(session, [*shared, 9], length=1)  # the same 32 tokens in two pages, and 9 more
    run(session)
    assert computed == [9]
    computed.clear()
    add(session, first.problem.token_ids + first.token_ids + [5], length=1)  # 64 of 73: the turn before
    run(session)
    assert computed == [9]


def test_prompts_that_enter_together_share_what_they_have_in_common(
    policy: Policy, kernels: ctypes.CDLL, computed: list[int]
):
    session = engine_of(policy, kernels).open_session(longest=64)
    shared = list(range(3, 35))
    for end in range(4):
        add(session, [*shared, end + 40], length=1)
    session.step()
    assert sum(computed) == 33 + 3


def test_the_bits_are_those_of_a_request_alone_whatever_was_kept(
    policy: Policy, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
):
    """Conversations that grow turn by turn, beside each other, while pages are kept, forgotten and cancelled."""
    numbers = random.Random(0)
    monkeypatch.setattr(native, "IDLE_BYTES", 12 * 16 * 4 * 1000)
    session, other = engine_of(policy, kernels).open_session(), engine_of(policy, kernels)
    texts = [[3 + i % 90 for i in range(20)] for _ in range(3)]
    for _ in range(12):
        asked = []
        for text in texts:
            del text[numbers.randint(120, 180) :]
            text += [numbers.randint(3, 90) for _ in range(numbers.randint(1, 20))]
            asked.append(add(session, list(text), length=numbers.randint(1, 24), n=numbers.randint(1, 2)))
        if numbers.random() < 0.5:
            session.step(within_s=0.0)
            session.cancel(asked.pop()[0])
        run(session)
        for requests in asked:
            alone = other.open_session(longest=256)
            prompt, length = requests[0].problem.token_ids, requests[0].max_new_tokens
            again = add(alone, prompt, length=length, n=len(requests))
            run(alone)
            assert bits(requests) == bits(again)
        for text, requests in zip(texts, asked, strict=False):
            text += requests[0].token_ids


def test_what_was_found_longest_ago_is_forgotten_first_and_an_end_before_its_beginning():
    prefixes = Prefixes(page_size=2, most_idle=3)
    prefixes.keep([1, 2, 3, 4, 5], [10, 11, 12])
    prefixes.keep([1, 2, 9, 9], [10, 13])
    assert prefixes.find([1, 2, 3, 4]) == [10]  # the last token's logits are wanted
    assert prefixes.find([1, 2, 3, 4, 0]) == [10, 11]
    assert prefixes.find([9, 9, 3]) == []
    assert prefixes.is_left(12) == [12]  # it was not full
    assert [prefixes.is_left(page) for page in (11, 13, 10)] == [[], [], []]
    assert prefixes.num_idle == 3
    prefixes.is_read(10)
    assert prefixes.forget(1) == [11]
    assert prefixes.find([1, 2, 3, 4, 0]) == [10]
    prefixes.keep([7, 7], [11])
    assert [prefixes.is_left(page) for page in (10, 11)] == [[], []]
    prefixes.keep([8, 8], [14])
    assert prefixes.is_left(14) == [13]
    assert prefixes.find([1, 2, 9, 9, 0]) == [10]
    assert prefixes.forget(9) == [10, 11, 14] and prefixes.num_idle == 0
    prefixes.keep([5, 5], [10])  # a page has another text now, and nothing that followed the old one is found
    prefixes.keep([1, 2, 3, 4], [15, 16])
    assert prefixes.find([5, 5, 3, 4, 0]) == [10]


def test_pages_are_forgotten_before_more_memory_is_taken(
    policy: Policy, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
):
    made = []

    class Watched(native.Pages):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            made.append(self)

    monkeypatch.setattr(native, "Pages", Watched)
    engine = NativeEngine(
        policy, kernels=kernels, stop_ids=(), decode=str, max_rows=4, kv_cache_tokens=16 * 40
    )
    session = engine.open_session()
    for start in range(30):
        add(session, [3 + (start + i) % 90 for i in range(100)], length=20)
        run(session)
    pages = made[0]
    assert pages.prefixes.num_idle == 10  # a quarter of all
    assert pages.num_in_use == 0
    requests = [add(session, [start + 3] * 140, length=10)[0] for start in range(4)]  # 40 pages
    run(session)
    assert all(request.finish_reason == "length" for request in requests)


def test_a_session_does_not_go_on_with_keys_and_values_of_earlier_weights(
    policy: Policy, kernels: ctypes.CDLL
):
    engine = engine_of(policy, kernels)
    session = engine.open_session()
    for between in ("texts", "tokens"):
        add(session, list(range(3, 43)), length=40)
        session.step(within_s=0.0)
        if between == "texts":
            run(session)
        engine.sync()
        if between == "texts":
            add(session, list(range(3, 43)), length=1)
        with pytest.raises(AssertionError, match="sync"):
            run(session)
        session = engine.open_session()
    add(session, list(range(3, 43)), length=1)
    run(session)
