"""Budgets of keys and values: what is refused, who waits, and that no token depends on it."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kitae.config import SamplingSettings
from kitae.errors import ConfigError
from kitae.rollout import budget, native
from kitae.rollout.base import Request
from kitae.rollout.native import NativeEngine
from kitae.rollout.pages import PAGE, Pages
from kitae.types import Rollout
from tests.rollout import test_native, test_native_experts
from tests.rollout.test_native import STOP, policy_of, problems_of, spell

ENOUGH = 1 << 20
PENALTY = SamplingSettings(temperature=0.8, repetition_penalty=1.2, max_new_tokens=40)
PLAIN = SamplingSettings(temperature=0.9, max_new_tokens=40)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("budget")


class Watched(Pages):
    """Pages that remember how many were in use at most."""

    made: list[Watched]

    def __init__(self, *args: Any, **how: Any) -> None:
        self.most_in_use = 0
        super().__init__(*args, **how)
        self.made.append(self)

    def take(self, count: int) -> list[int]:
        taken = super().take(count)
        self.most_in_use = max(self.most_in_use, self.num_in_use)
        return taken


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    monkeypatch.setattr(Watched, "made", [], raising=False)
    monkeypatch.setattr(native, "Pages", Watched)
    return Watched.made


def engine_of(
    root: Path, kernels: ctypes.CDLL, tokens: int | None, *, shape: str = "qwen3", stops: tuple[int, ...] = (STOP,),
    max_rows: int = 16, **how: Any,
) -> NativeEngine:  # fmt: skip
    where = test_native_experts if shape == "v3" else test_native
    return NativeEngine(
        policy_of(where.folder_of(root, shape)),
        kernels=kernels,
        stop_ids=stops,
        decode=spell,
        max_rows=max_rows,
        kv_cache_tokens=tokens,
        kv_setting="rollout.kv_cache_tokens",
        **how,
    )


def bits(groups: list[list[Rollout]]) -> list[Any]:
    return [[(r.token_ids, r.logprobs, r.kept_ids, r.finish_reason) for r in group] for group in groups]


@pytest.mark.parametrize(("shape", "quantization"), [("qwen3", "none"), ("v3", "none"), ("qwen3", "int8")])
@pytest.mark.parametrize("sampling", [PLAIN, PENALTY], ids=["drawn by the kernel", "drawn in Python"])
def test_tokens_and_their_bits_do_not_depend_on_the_budget(
    root: Path, kernels: ctypes.CDLL, watched: list[Watched], shape: str, quantization: str, sampling: Any
):
    """From room for all down to room for one row, with prompts around the borders of pages."""
    problems = problems_of([1, 15, 16, 17, 32, 47])
    how = {"shape": shape, "quantization": quantization}
    expected = bits(
        engine_of(root, kernels, ENOUGH, **how).generate(problems, n=4, sampling=sampling, seed=5)
    )
    longest = 47 + sampling.max_new_tokens - 1
    for tokens in (2000, 400, 7 * PAGE, -(-longest // PAGE) * PAGE):
        engine = engine_of(root, kernels, tokens, **how)
        assert bits(engine.generate(problems, n=4, sampling=sampling, seed=5)) == expected
        assert watched[-1].most_in_use <= tokens // PAGE
        assert watched[-1].num_in_use == 0


def test_random_budgets_limits_and_groups_give_each_request_the_same(root: Path, kernels: ctypes.CDLL):
    numbers = random.Random(3)
    problems = problems_of([numbers.randint(1, 60) for _ in range(9)])
    limits = [[numbers.randint(1, 50) for _ in range(numbers.randint(1, 6))] for _ in problems]
    settings = {"problems": problems, "sampling": PLAIN, "seed": 2}
    for stops in ((), (STOP, 5, 9, 40, 77, 130)):
        expected = bits(engine_of(root, kernels, ENOUGH, stops=stops).generate_up_to(limits, **settings))
        longest = max(len(p.token_ids) + max(own) for p, own in zip(problems, limits, strict=True))
        for _ in range(12):
            tokens = -(-longest // PAGE) * PAGE + numbers.choice([0, 5, 16, 50, 200, 700])
            engine = engine_of(root, kernels, tokens, stops=stops, max_rows=numbers.choice([2, 5, 16]))
            assert bits(engine.generate_up_to(limits, **settings)) == expected


def test_rows_that_outgrow_the_budget_wait_and_go_on(
    root: Path, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
):
    put_back: list[tuple[Request, int]] = []
    plain = native.Scheduler.put_back

    def watch(self: Any) -> Request:
        request = plain(self)
        put_back.append((request, len(request.token_ids)))
        return request

    monkeypatch.setattr(native.Scheduler, "put_back", watch)
    session = engine_of(root, kernels, 32 * PAGE, stops=()).open_session()
    requests = [
        session.add(p, limits=[160], sampling=PLAIN, seed=1)[0] for p in problems_of([10, 20, 30, 40])
    ]
    seen: dict[Request, list[int]] = {r: [] for r in requests}
    while not session.is_idle:
        for event in session.step():
            seen[event.request] += event.token_ids
    assert put_back
    assert all(0 < count < 160 for _, count in put_back)
    assert requests[0] not in [request for request, _ in put_back]
    assert [seen[r] for r in requests] == [r.token_ids for r in requests]
    assert all(len(r.token_ids) == len(r.logprobs) == 160 for r in requests)


def test_groups_wait_rather_than_be_put_back_soon(
    root: Path, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
):
    def refuse(self: Any) -> Request:
        raise AssertionError("put back")

    monkeypatch.setattr(native.Scheduler, "put_back", refuse)
    engine = engine_of(root, kernels, 20 * PAGE, stops=())
    groups = engine.generate(
        problems_of([30] * 10), n=3, sampling=SamplingSettings(max_new_tokens=60), seed=0
    )
    assert all(len(r.token_ids) == 60 for group in groups for r in group)


def test_a_row_too_long_for_the_budget_is_refused_before_anything_is_sampled(
    root: Path, kernels: ctypes.CDLL, watched: list[Watched]
):
    """The last token's keys and values are never needed: 20 + 29 - 1 tokens are three pages."""
    engine = engine_of(root, kernels, 3 * PAGE, stops=())
    problems = problems_of([5, 20])
    groups = engine.generate_up_to([[3], [29]], problems=problems, sampling=PLAIN, seed=0)
    assert [len(group[0].token_ids) for group in groups] == [3, 29]
    reason = (
        "the prompt has 20 tokens and max_new_tokens is 30, but keys and values of 48 tokens fit: "
        "rollout.kv_cache_tokens is 48; raise that, or lower max_new_tokens"
    )
    with pytest.raises(ConfigError, match=reason):
        engine.generate_up_to([[3], [30]], problems=problems, sampling=PLAIN, seed=0)
    assert watched[-1].most_in_use == 0
    session = engine.open_session()
    with pytest.raises(ConfigError, match=r"rollout\.kv_cache_tokens is 48"):
        session.add(problems[1], limits=[4, 30], sampling=PLAIN)
    request = session.add(problems[1], limits=[29], sampling=PLAIN)[0]
    while not session.is_idle:
        session.step()
    assert request.finish_reason == "length"


def test_without_a_setting_half_of_the_free_memory_is_taken(
    root: Path, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
):
    """The model keeps 2 layers x 2 key heads x (16 + 16) numbers of 4 bytes: 512 bytes for each token."""

    class Machine:
        def memory(self, device: torch.device) -> tuple[int, int]:
            return 64 * 1024, 1 << 30

    monkeypatch.setattr(budget, "backends", SimpleNamespace(of=lambda _: Machine()))
    session = engine_of(root, kernels, None).open_session()
    with pytest.raises(
        ConfigError, match=r"64 tokens fit: 0 MiB of the free memory is theirs where rollout\.kv"
    ):
        session.add(problems_of([10])[0], limits=[56], sampling=PLAIN)
    session.add(problems_of([10])[0], limits=[55], sampling=PLAIN)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="keys and values of 32 tokens fit"):
        engine_of(root, kernels, None).open_session().add(problems_of([10])[0], limits=[55], sampling=PLAIN)


def test_a_cancelled_row_that_was_put_back_leaves_nothing(
    root: Path, kernels: ctypes.CDLL, watched: list[Watched]
):
    session = engine_of(root, kernels, 32 * PAGE, stops=()).open_session()
    requests = [session.add(p, limits=[160], sampling=PLAIN)[0] for p in problems_of([10, 20, 30, 40])]
    session.step()
    while session.num_waiting == 0:
        session.step()
    waiting = requests[-1]
    count = len(waiting.token_ids)
    assert count > 0
    session.cancel(waiting)
    while not session.is_idle:
        session.step()
    assert len(waiting.token_ids) == count
    assert [len(r.token_ids) for r in requests if r is not waiting] == [160] * 3
    assert watched[-1].num_in_use == 0
