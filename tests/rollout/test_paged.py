"""The paged engine on a CPU, its attention the slow one: scheduling, pages and sampling. tests/gpu runs it on a GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import COMPARED, read_method, train
from torch import Tensor
from toy_task import make_files

from kitae import backends
from kitae.backends import Recording
from kitae.config import LoraSettings, ModelSettings, SamplingSettings
from kitae.errors import ConfigError, NonFiniteError
from kitae.models.attention import attend
from kitae.models.load import load_policy
from kitae.models.policy import Policy
from kitae.rollout import choose, paged
from kitae.rollout.background import BackgroundEngine
from kitae.rollout.choose import open_engine
from kitae.rollout.generic import GenericEngine
from kitae.rollout.page_cache import attend_slowly
from kitae.rollout.paged import PagedEngine
from kitae.types import Packing, Problem, Segment
from tests.rollout.test_generic import SHARP, STOP, policy_of, problems_of, spell, tokens

LENGTHS = [3, 17, 64, 1, 130, 15, 16]
SAMPLINGS = {
    "greedy": {"temperature": 0},
    "whole distribution": {},
    "hot": {"temperature": 1.7},
    "top-p": {"temperature": 0.8, "top_p": 0.8},
    "top-k": {"top_k": 5},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


def engine_of(policy: Any, **how: Any) -> PagedEngine:
    return PagedEngine(policy, **{"stop_ids": [STOP], "decode": spell, "max_rows": 5, **how})


def changeable(folder: Path) -> Policy:
    """One of its own; policy_of gives all tests the same."""
    settings = ModelSettings(name_or_path=str(folder), dtype="float32", device="cpu")
    return load_policy(settings, trainable=False)


def sampled(engine: Any, sampling: SamplingSettings, *, n: int = 3) -> list[list[Any]]:
    return engine.generate(problems_of(LENGTHS), n=n, sampling=sampling, seed=7)


@pytest.mark.parametrize(
    ("family", "sampling"),
    [*(("qwen3", name) for name in SAMPLINGS), ("qwen2", "hot"), ("llama", "hot"), ("deepseek_v3", "top-p")],
)
def test_rollouts_are_those_of_the_generic_engine(family: str, sampling: str, tiny: Callable[..., Path]):
    policy = policy_of(tiny(family, **SHARP))
    how = SamplingSettings(max_new_tokens=37, **SAMPLINGS[sampling])
    expected = sampled(GenericEngine(policy, stop_ids=[STOP], decode=spell, max_rows=5), how)
    engine = engine_of(policy)
    for _ in range(2):  # a session after another has their memory
        found = sampled(engine, how)
        assert tokens(found) == tokens(expected)
        for group, others in zip(found, expected, strict=True):
            for a, b in zip(group, others, strict=True):
                torch.testing.assert_close(
                    torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=2e-5
                )
                assert (a.finish_reason, a.text) == (b.finish_reason, b.text)
                for x, y in zip(a.kept_ids or [], b.kept_ids or [], strict=True):
                    # One at the border may fall to either side, and another that is as likely take its place.
                    assert len(set(x) - set(y)) <= 1 and len(set(y) - set(x)) <= 1, (x, y)


@pytest.mark.parametrize("kv_cache_tokens", [192, 320, 1024])
@pytest.mark.parametrize("max_rows", [1, 3, 16])
def test_no_token_depends_on_memory_or_rows(kv_cache_tokens: int, max_rows: int, tiny: Callable[..., Path]):
    policy, how = policy_of(tiny("qwen3", **SHARP)), SamplingSettings(max_new_tokens=50)
    expected = sampled(engine_of(policy), how)
    assert tokens(
        sampled(engine_of(policy, max_rows=max_rows, kv_cache_tokens=kv_cache_tokens), how)
    ) == tokens(expected)


def test_a_row_that_could_not_run_alone_is_refused(tiny: Callable[..., Path]):
    engine = engine_of(policy_of(tiny("qwen3")), kv_cache_tokens=96, kv_setting="rollout.kv_cache_tokens")
    with pytest.raises(
        ConfigError, match=r"130 tokens and max_new_tokens is 9.*96 tokens fit: rollout.kv_cache_tokens is 96"
    ):
        sampled(engine, SamplingSettings(max_new_tokens=9))


@pytest.mark.parametrize("context", [None, 64])
def test_a_row_is_never_longer_than_its_table(
    context: int | None, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """In a session that was told no length, such as a server's, the model's context is it, or else LONGEST."""
    monkeypatch.setattr(paged, "LONGEST", 64)
    policy = changeable(tiny("qwen3"))
    vars(policy.config)["max_position_embeddings"] = context  # beside its checks, which know no None
    session = engine_of(policy, max_rows=4).open_session()
    (problem,) = problems_of([40])
    with pytest.raises(ConfigError, match="the model's context is 64"):
        session.add(problem, limits=[25], sampling=SamplingSettings(max_new_tokens=25))
    (request,) = session.add(problem, limits=[24], sampling=SamplingSettings(max_new_tokens=24))
    while not session.is_idle:
        session.step()
    assert request.finish_reason is not None


def test_a_cancelled_row_changes_no_other_and_every_page_comes_back(tiny: Callable[..., Path]):
    policy, how = policy_of(tiny("qwen3", **SHARP)), SamplingSettings(max_new_tokens=40)
    expected = engine_of(policy).generate(problems_of(LENGTHS), n=2, sampling=how, seed=7)
    session = engine_of(policy).open_session(max_rows=5, longest=200)
    assert session.budget is not None
    before = session.budget.num_left
    groups = [session.add(p, limits=[40, 40], sampling=how, seed=7) for p in problems_of(LENGTHS)]
    session.step(within_s=0.0)
    session.cancel(groups[0][1])  # under way
    session.cancel(groups[6][0])  # still waits
    while not session.is_idle:
        session.step()
    for place, group in enumerate(groups):
        for sample, request in enumerate(group):
            if request.finish_reason == "cancelled":
                assert (place, sample) in ((0, 1), (6, 0))
            else:
                assert request.token_ids == expected[place][sample].token_ids
    assert session.budget.num_left == before


def test_rows_of_different_settings_run_side_by_side(tiny: Callable[..., Path]):
    """Steps whose logits the host sees and those it does not take turns as rows come and go."""
    policy = policy_of(tiny("qwen3", **SHARP))
    limits = [30, 9, 21, 5, 40, 12]
    ways = [SamplingSettings(max_new_tokens=n, **s) for n, s in zip(limits, SAMPLINGS.values(), strict=True)]
    pairs = list(zip(problems_of(LENGTHS[:6]), ways, strict=True))
    alone = [engine_of(policy).generate([p], n=1, sampling=how, seed=1)[0][0] for p, how in pairs]
    session = engine_of(policy).open_session(max_rows=3, longest=200)
    requests = [session.add(p, limits=[how.max_new_tokens], sampling=how, seed=1)[0] for p, how in pairs]
    while not session.is_idle:
        session.step()
    assert [r.token_ids for r in requests] == [r.token_ids for r in alone]


def test_a_session_after_another_has_its_pages(tiny: Callable[..., Path]):
    engine, how = engine_of(policy_of(tiny("qwen3"))), SamplingSettings(max_new_tokens=30)
    first, second = (engine.open_session(max_rows=2, longest=100) for _ in range(2))
    for session in (first, second):
        session.add(problems_of([5])[0], limits=[30], sampling=how)
    second.step()
    with pytest.raises(AssertionError, match="session 2 has the pages of session 1"):
        first.step()


def test_an_adapter_is_part_of_the_steps(tiny: Callable[..., Path]):
    settings = ModelSettings(name_or_path=str(tiny("qwen3", **SHARP)), dtype="float32", device="cpu")
    policy = load_policy(settings, lora=LoraSettings(rank=4))
    how = SamplingSettings(max_new_tokens=20)
    plain = tokens(sampled(engine_of(policy), how))
    with torch.no_grad():
        for _, parameter in policy.named_trainable():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    found = tokens(sampled(engine_of(policy), how))
    assert found == tokens(sampled(GenericEngine(policy, stop_ids=[STOP], decode=spell, max_rows=5), how))
    assert found != plain
    assert policy.training, "sampling puts the policy's mode back"


def test_memory_grows_only_when_a_session_needs_more(tiny: Callable[..., Path]):
    engine = engine_of(policy_of(tiny("qwen3")))
    for longest, rows, same in (
        (200, 4, False),
        (256, 2, True),
        (257, 2, False),
        (512, 4, True),
        (100, 5, False),
    ):
        before = engine._steps
        engine.open_session(max_rows=rows, longest=longest)
        assert (engine._steps is before) == same, (longest, rows)
    assert engine._steps is not None and (engine._steps.max_rows, engine._steps.longest) == (5, 512)


def test_somebody_who_reads_along_gets_tokens_as_they_come(tiny: Callable[..., Path]):
    policy, how = policy_of(tiny("qwen3", **SHARP)), SamplingSettings(max_new_tokens=40)
    said: dict[tuple[int, int], list[int]] = {}
    calls = []

    def on_tokens(problem: int, sample: int, ids: list[int]) -> None:
        calls.append(len(ids))
        said.setdefault((problem, sample), []).extend(ids)

    found = engine_of(policy).generate(problems_of(LENGTHS), n=2, sampling=how, seed=7, on_tokens=on_tokens)
    assert said == {(p, s): r.token_ids for p, group in enumerate(found) for s, r in enumerate(group)}
    assert tokens(found) == tokens(
        engine_of(policy).generate(problems_of(LENGTHS), n=2, sampling=how, seed=7)
    )
    assert max(calls) <= 16


class Replaying:
    """A backend's `record` on a CPU: a replay does the work again, into the same tensor."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Tensor], *, pool: Any = None) -> Recording:
        self.recorded += 1
        result = work()

        def replay() -> None:
            self.replayed += 1
            result.copy_(work())

        return Recording(replay, result, self)


def test_recorded_steps_give_the_same_and_are_recorded_once(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    policy, how = policy_of(tiny("qwen3", **SHARP)), SamplingSettings(max_new_tokens=37)
    expected = sampled(engine_of(policy), how)
    record = Replaying()
    monkeypatch.setattr(backends.of(torch.device("cpu")), "record", record, raising=False)
    engine = engine_of(policy, records=True)
    assert tokens(sampled(engine, how)) == tokens(expected)
    recorded = record.recorded
    assert 1 <= recorded <= 4  # 1, 2, 4, 8 rows
    assert tokens(sampled(engine, how)) == tokens(expected)
    assert record.recorded == recorded < record.replayed


def test_what_cannot_be_recorded_is_launched(tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture):
    policy, how = policy_of(tiny("qwen3", **SHARP)), SamplingSettings(max_new_tokens=12)
    with caplog.at_level(logging.WARNING):
        found = sampled(engine_of(policy, records=True), how)
    assert tokens(found) == tokens(sampled(engine_of(policy), how))
    (message,) = [r.getMessage() for r in caplog.records if "recorded" in r.getMessage()]
    assert "this device cannot record work" in message and "slower" in message


def test_broken_weights_are_an_error(tiny: Callable[..., Path]):
    policy = policy_of(tiny("qwen3", seed=5))
    with torch.no_grad():
        policy.causal_lm.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="not finite"):
        sampled(engine_of(policy), SamplingSettings(max_new_tokens=4))


def test_on_a_cpu_it_is_not_chosen_and_says_why(tiny: Callable[..., Path]):
    with pytest.raises(
        ConfigError, match=r"rollout.engine is paged, but .* it runs on cpu.*set it to auto or generic"
    ):
        open_engine(
            policy_of(tiny("qwen3")), wanted="paged", setting="rollout.engine", expected_tokens=1e9, stop_ids=[STOP],
            decode=spell, max_rows=4,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("queries", "heads", "size", "value_size"), [(4, 2, 16, 16), (6, 1, 8, 8), (3, 3, 24, 16)]
)
def test_slow_attention_over_pages_is_the_packed_one(queries: int, heads: int, size: int, value_size: int):
    drawn = torch.Generator().manual_seed(0)
    lengths = [1, 16, 17, 50]
    tables = torch.randperm(32, generator=drawn)[:16].view(4, 4).int()
    keys, values = (torch.full((32, 16, heads, n), torch.nan) for n in (size, value_size))
    for row in range(len(lengths)):
        for t in range(64):  # what lies behind the row's end is finite and must not count
            place = tables[row, t // 16], t % 16
            keys[place], values[place] = (
                torch.randn(heads, size, generator=drawn),
                torch.randn(heads, value_size, generator=drawn),
            )
    q = torch.randn(len(lengths), queries, size, generator=drawn)
    found = attend_slowly(q, keys, values, tables, torch.tensor(lengths) - 1, 0.3)
    for row, length in enumerate(lengths):
        k, v = (x[tables[row].long()].flatten(0, 1)[:length] for x in (keys, values))
        whole = torch.zeros(length, queries, size)
        whole[-1] = q[row]
        expected = attend(whole, k, v, Packing(segments=[Segment(0, length)], num_tokens=length), scaling=0.3)
        torch.testing.assert_close(found[row], expected[-1])


def open_auto(policy: Any, **more: Any) -> choose.Chosen:
    return open_engine(
        policy, wanted="auto", setting="rollout.engine", expected_tokens=1e9, stop_ids=[STOP], decode=spell,
        max_rows=4, **more,
    )  # fmt: skip


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paged engine is chosen on a CPU, with the slow attention."""
    monkeypatch.setattr(choose, "why_not_paged", lambda policy: None)
    monkeypatch.setattr(choose, "fast_attend", lambda: attend_slowly)


@pytest.mark.parametrize(("family", "records"), [("qwen3", True), ("deepseek_v3", False)])
def test_steps_of_routed_experts_are_not_recorded(
    family: str, records: bool, as_on_a_gpu: None, tiny: Callable[..., Path]
):
    """They read from the device how many tokens each expert has, which breaks a recording off."""
    engine, name = open_auto(policy_of(tiny(family)))
    assert isinstance(engine, PagedEngine) and name == "paged"
    assert engine._records == records


def test_a_thread_samples_from_a_copy_whose_steps_are_not_recorded(
    as_on_a_gpu: None, tiny: Callable[..., Path]
):
    folder, how = tiny("qwen3", **SHARP), SamplingSettings(max_new_tokens=20)
    policy = changeable(folder).requires_grad_(True)
    engine, _ = open_auto(policy, load_copy=lambda: changeable(folder))
    assert isinstance(engine, PagedEngine)
    assert engine.policy is not policy
    assert engine._records is False
    background = BackgroundEngine(engine, source=policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    background.sync()
    expected = tokens(sampled(engine_of(policy), how))
    running = background.begin(
        problems_of(LENGTHS), n=3, sampling=how, seed=7, on_rollout=lambda *place: None
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert tokens(running.result()) == expected
    background.close()


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_a_run_is_that_of_the_generic_engine_and_goes_on_as_if_it_had_not_stopped(
    recipe: str, as_on_a_gpu: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    files = make_files(tmp_path_factory.mktemp("files"))

    def run(name: str, steps: int, *, engine: str = "auto", **more: Any) -> list[dict[str, Any]]:
        changes = {"train": {"max_steps": steps}, "log": {"steps": 1}, "save": {"steps": 2}, **more}
        changes |= {"rollout": {"engine": engine, "max_new_tokens": 20, "prompts_per_round": 4}}
        changes |= {"optim": {"lr_scheduler": "constant", "warmup_ratio": 0.0}}
        lines = train(read_method(recipe), files=files, output_dir=tmp_path / name, changes=changes)
        return [{k: v for k, v in line.items() if k.startswith(COMPARED)} for line in lines]

    whole = run("paged", 4)
    assert json.loads((tmp_path / "paged" / "run.json").read_text())["facts"]["rollout_engine"] == "paged"
    for line, other in zip(whole, run("generic", 4, engine="generic"), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    run("cut", 2)
    assert run("cut", 4, resume=True, allow_inexact=True) == whole


def test_a_prompt_that_begins_like_another_leaves_its_pages_as_they_are(tiny: Callable[..., Path]):
    """The second one computes the beginning again, and keeps nothing of it."""
    policy, how = policy_of(tiny("qwen3", **SHARP)), SamplingSettings(max_new_tokens=20)
    (first,) = problems_of([40])
    second = Problem(prompt="", token_ids=[*first.token_ids[:35], 9, 9, 9], index=1)
    alone = [engine_of(policy).generate([p], n=2, sampling=how, seed=0)[0] for p in (first, second)]
    both = engine_of(policy).generate([first, second], n=2, sampling=how, seed=0)
    assert tokens(both) == tokens(alone)
