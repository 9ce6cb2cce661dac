"""The native engine against transformers' generate, the learner's packed forward, and itself in other company."""

from __future__ import annotations

import ctypes
import functools
import platform
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kitae import compiler
from kitae.config import LoraSettings, ModelSettings, SamplingSettings
from kitae.data.collate import collate
from kitae.errors import ConfigError, DataError, ModelError, NonFiniteError, PlanError
from kitae.models.load import load_policy
from kitae.models.policy import Policy
from kitae.models.toy import make_config
from kitae.rollout import build
from kitae.rollout.generic import GenericEngine
from kitae.rollout.native import NativeEngine
from kitae.rollout.pages import HostPages
from kitae.rollout.shapes import why_not_native
from kitae.types import Problem, Rollout, Row
from tests.rollout.test_generic import rows_of

STOP = 2
VOCABULARY = 331  # no multiple of anything
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"family": "qwen3"},
    "qwen2 with biases": {"family": "qwen2"},
    "llama": {"family": "llama"},
    "llama with all biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3 angles": {
        "family": "llama",
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "yarn angles": {
        "family": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "odd sizes": {"family": "qwen3", "hidden_size": 75, "intermediate_size": 101},
    "heads of 64, 7 on each key": {
        "family": "qwen3", "head_dim": 64, "num_attention_heads": 7, "num_key_value_heads": 1,
    },
    "heads of 128, untied": {
        "family": "qwen3", "head_dim": 128, "num_attention_heads": 3, "num_key_value_heads": 3,
        "tie_word_embeddings": False,
    },
    "heads of 80, 5 on each key": {
        "family": "qwen3", "head_dim": 80, "num_attention_heads": 10, "num_key_value_heads": 2,
    },
    "16 key heads in one layer": {
        "family": "llama", "hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_hidden_layers": 1,
    },
}  # fmt: skip
EDGES = [1, 15, 16, 17, 32, 33, 300]
"""Prompt lengths around the borders of pages, and one that takes two passes."""


@functools.cache
def folder_of(root: Path, shape: str) -> Path:
    """A random model whose biases and norms are random too."""
    from transformers import AutoModelForCausalLM

    sizes = {**SHAPES[shape]}
    folder = root / shape.replace(" ", "-")
    torch.manual_seed(1)
    config = make_config(
        sizes.pop("family"),
        vocab_size=VOCABULARY,
        initializer_range=0.15,
        max_position_embeddings=512,
        **sizes,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@functools.cache
def policy_of(folder: Path, *, dtype: str = "float32") -> Policy:
    return load_policy(ModelSettings(name_or_path=str(folder), dtype=dtype, device="cpu"), trainable=False)


def spell(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def engine_of(
    policy: Policy, kernels: ctypes.CDLL, *, max_rows: int = 64, stop_ids: tuple[int, ...] = (STOP,)
) -> NativeEngine:
    return NativeEngine(policy, kernels=kernels, stop_ids=stop_ids, decode=spell, max_rows=max_rows)


def problems_of(lengths: list[int], *, first_index: int = 10) -> list[Problem]:
    numbers = torch.Generator().manual_seed(len(lengths))
    return [
        Problem(
            prompt="",
            token_ids=torch.randint(3, VOCABULARY, (n,), generator=numbers).tolist(),
            index=first_index + i,
        )
        for i, n in enumerate(lengths)
    ]


def tokens(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[r.token_ids for r in group] for group in groups]


def differences(policy: Policy, groups: list[list[Rollout]], *, temperature: float) -> torch.Tensor:
    """Log-probs the learner gives minus those the sampler returned, of all tokens."""
    found = []
    for batch in collate(rows_of(groups), rows_per_forward=16, temperature=temperature):
        with torch.no_grad():
            found.append(policy(batch).logprobs_N - batch.streams["old_logprobs"])
    return torch.cat(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_generate_whatever_the_sizes(root: Path, kernels: ctypes.CDLL, shape: str):
    from transformers import AutoModelForCausalLM

    folder = folder_of(root, shape)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    problems = problems_of(EDGES)
    expected = []
    for problem in problems:
        ids = torch.tensor([problem.token_ids])
        out = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=STOP, pad_token_id=0)
        expected.append(out[0, ids.shape[1] :].tolist())
    sampling = SamplingSettings(temperature=0, max_new_tokens=20)
    groups = engine_of(policy_of(folder), kernels, max_rows=5).generate(
        problems, n=2, sampling=sampling, seed=0
    )
    assert tokens(groups) == [[ids, ids] for ids in expected]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(temperature=0.7, max_new_tokens=40),
        SamplingSettings(temperature=1.3, top_p=0.8, max_new_tokens=12),
        SamplingSettings(top_k=9, min_p=0.02, max_new_tokens=12),
    ],
    ids=["temperature", "top-p", "top-k and min-p"],
)
@pytest.mark.parametrize("shape", ["qwen3", "qwen2 with biases", "llama3 angles", "odd sizes"])
def test_log_probs_are_those_of_the_learner(
    root: Path, kernels: ctypes.CDLL, shape: str, sampling: SamplingSettings
):
    policy = policy_of(folder_of(root, shape))
    groups = engine_of(policy, kernels, max_rows=9).generate(
        problems_of(EDGES), n=4, sampling=sampling, seed=1
    )
    ratio_N = differences(policy, groups, temperature=sampling.temperature).exp()
    assert len(ratio_N) > 200
    assert (ratio_N - 1).abs().max().item() <= 1e-5


@pytest.mark.parametrize("shape", ["qwen3", "qwen2 with biases", "heads of 128, untied", "odd sizes"])
def test_in_bfloat16_log_probs_differ_from_the_learners_by_its_own_rounding(
    root: Path, kernels: ctypes.CDLL, shape: str
):
    """The native engine keeps the residual stream in float32, so it is nearer to the exact number than the learner is."""
    folder = folder_of(root, shape)
    policy = policy_of(folder, dtype="bfloat16")
    groups = engine_of(policy, kernels, max_rows=9).generate(
        problems_of(EDGES), n=4, sampling=SamplingSettings(max_new_tokens=30), seed=1
    )
    exact = load_policy(
        ModelSettings(name_or_path=str(folder), dtype="float32", device="cpu"), trainable=False
    )
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16().float())
    learners_N, ours_N = (differences(p, groups, temperature=1.0) for p in (policy, exact))
    assert ours_N.abs().mean().item() <= 0.02
    assert learners_N.abs().mean().item() <= 0.03
    assert abs(learners_N.mean().item()) <= 0.01
    assert ours_N.abs().mean().item() <= (learners_N - ours_N).abs().mean().item() * 1.5


def test_sampling_follows_the_distribution(root: Path, kernels: ctypes.CDLL):
    policy = policy_of(folder_of(root, "llama"))
    problem = problems_of([9])[0]
    groups = engine_of(policy, kernels, max_rows=512).generate(
        [problem], n=4000, sampling=SamplingSettings(temperature=1.5, max_new_tokens=1), seed=3
    )
    (batch,) = collate(
        [Row(token_ids=[*problem.token_ids, 5], loss_mask=[False] * 9 + [True])], rows_per_forward=1
    )
    with torch.no_grad():
        logits_NV = policy.logits(policy.predicting(batch))
    expected_V = (logits_NV[0] / 1.5).softmax(-1) * 4000
    counted_V = torch.bincount(torch.tensor([r.token_ids[0] for r in groups[0]]), minlength=VOCABULARY)
    often = expected_V >= 5
    chi_squared = ((counted_V - expected_V)[often] ** 2 / expected_V[often]).sum().item()
    degrees = int(often.sum()) - 1
    assert degrees > 50
    assert abs(chi_squared / degrees - 1) < 5 * (2 / degrees) ** 0.5


def bits(groups: list[list[Rollout]]) -> list[list[tuple[list[int], list[float]]]]:
    return [[(r.token_ids, r.logprobs) for r in group] for group in groups]


def require_same_bits_in_any_company(
    engine: Callable[..., NativeEngine], *, max_new_tokens: int, mixes: int
) -> None:
    """Random mixes of requests, rows in flight and threads; `engine(max_rows=...)` makes one."""
    problems = problems_of([1, 15, 16, 17, 32, 5, 40, 290])
    sampling = SamplingSettings(temperature=0.9, max_new_tokens=max_new_tokens)
    alone = {p.index: bits(engine().generate([p], n=5, sampling=sampling, seed=7))[0] for p in problems}
    numbers = random.Random(0)
    before = torch.get_num_threads()
    try:
        for _ in range(mixes):
            some = numbers.sample(problems, numbers.randint(1, len(problems)))
            n, max_rows = numbers.randint(1, 5), numbers.choice([1, 2, 3, 7, 12, 40])
            torch.set_num_threads(numbers.choice([1, 2, 3]))
            groups = engine(max_rows=max_rows).generate(some, n=n, sampling=sampling, seed=7)
            assert bits(groups) == [alone[p.index][:n] for p in some]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_completion_has_the_same_bits_in_any_company(root: Path, kernels: ctypes.CDLL, dtype: str):
    policy = policy_of(folder_of(root, "qwen3"), dtype=dtype)
    engine = functools.partial(engine_of, policy, kernels)
    require_same_bits_in_any_company(engine, max_new_tokens=24, mixes=50)


def test_it_draws_the_tokens_the_generic_engine_draws(root: Path, kernels: ctypes.CDLL):
    policy = policy_of(folder_of(root, "qwen3"))
    generic = GenericEngine(policy, stop_ids=(STOP,), decode=spell, max_rows=8)
    for sampling in (
        SamplingSettings(max_new_tokens=40),
        SamplingSettings(top_p=0.9, max_new_tokens=20),
        SamplingSettings(temperature=0, repetition_penalty=1.4, no_repeat_ngram_size=2, max_new_tokens=20),
    ):
        ours, theirs = (
            engine.generate(problems_of(EDGES), n=3, sampling=sampling, seed=5)
            for engine in (engine_of(policy, kernels), generic)
        )
        assert tokens(ours) == tokens(theirs)
        assert [[r.kept_ids for r in g] for g in ours] == [[r.kept_ids for r in g] for g in theirs]
        assert [[(r.finish_reason, r.text) for r in g] for g in ours] == [
            [(r.finish_reason, r.text) for r in g] for g in theirs
        ]


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="elsewhere the kernels are the portable ones anyway"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_for_older_cpus_compute_the_same(
    root: Path, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, dtype: str
):
    older = [f if not f.startswith("-march") else "-march=x86-64-v2" for f in compiler.FLAGS]
    monkeypatch.setattr(compiler, "FLAGS", older)
    portable = build.load_kernels()
    assert portable._name != kernels._name
    for shape in ("qwen3", "qwen2 with biases", "odd sizes", "heads of 80, 5 on each key"):
        policy = policy_of(folder_of(root, shape), dtype=dtype)
        # Later tokens could differ where rounding tips a choice.
        sampling = SamplingSettings(max_new_tokens=1)
        found = [
            engine_of(policy, k).generate(problems_of(EDGES), n=2, sampling=sampling, seed=4)
            for k in (kernels, portable)
        ]
        ours, theirs = ([r.logprobs[0] for g in groups for r in g] for groups in found)
        if dtype == "float32":
            assert tokens(found[0]) == tokens(found[1])
        first, second = ([r.token_ids for g in groups for r in g] for groups in found)
        same = [a == b for a, b in zip(first, second, strict=True)]
        assert sum(same) >= 0.7 * len(same)
        gaps = [abs(a - b) for a, b, s in zip(ours, theirs, same, strict=True) if s]
        assert max(gaps) <= (1e-5 if dtype == "float32" else 0.05)


def test_sync_takes_the_present_weights(root: Path, kernels: ctypes.CDLL):
    policy = load_policy(
        ModelSettings(name_or_path=str(folder_of(root, "qwen2 with biases")), dtype="float32", device="cpu")
    )
    engine = engine_of(policy, kernels)
    sampling = SamplingSettings(max_new_tokens=16)
    for seed in range(3):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        before = engine.generate(problems_of([4]), n=1, sampling=sampling, seed=0) if seed else None
        engine.sync()
        groups = engine.generate(problems_of(EDGES), n=2, sampling=sampling, seed=seed)
        assert differences(policy, groups, temperature=1.0).abs().max().item() <= 1e-5
        if before is not None:
            assert differences(policy, before, temperature=1.0).abs().max().item() > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_adapters_are_merged_into_their_layers(
    root: Path, kernels: ctypes.CDLL, dtype: str, tolerance: float
):
    policy = load_policy(
        ModelSettings(name_or_path=str(folder_of(root, "qwen3")), dtype=dtype, device="cpu"),
        lora=LoraSettings(rank=4, alpha=8),
    )
    engine = engine_of(policy, kernels)
    engine.sync()
    with torch.no_grad():
        for name, parameter in policy.named_trainable():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.03)
    engine.sync()
    groups = engine.generate(problems_of(EDGES), n=2, sampling=SamplingSettings(max_new_tokens=20), seed=0)
    found_N = differences(policy.eval(), groups, temperature=1.0)
    assert found_N.abs().mean().item() <= tolerance
    with policy.without_adapter():
        engine.sync()
        start = engine.generate(problems_of([20]), n=2, sampling=SamplingSettings(max_new_tokens=20), seed=0)
        assert differences(policy, start, temperature=1.0).abs().mean().item() <= tolerance
    assert differences(policy, start, temperature=1.0).abs().mean().item() > 2 * tolerance


def test_a_group_larger_than_all_rows_and_limits_of_its_own(root: Path, kernels: ctypes.CDLL):
    engine = engine_of(policy_of(folder_of(root, "qwen3")), kernels, max_rows=4, stop_ids=())
    limits = [[1, 9, 4, 30, 2, 1, 17, 16, 15, 1], [1], [3, 5]]
    groups = engine.generate_up_to(
        limits, problems=problems_of([16, 1, 40]), sampling=SamplingSettings(), seed=0
    )
    assert [[len(r.token_ids) for r in group] for group in groups] == limits
    assert engine.generate([], n=2, sampling=SamplingSettings(), seed=0) == []


def test_streamed_tokens_are_those_returned(root: Path, kernels: ctypes.CDLL):
    engine = engine_of(policy_of(folder_of(root, "qwen3")), kernels, max_rows=3)
    streamed: dict[tuple[int, int], list[int]] = {}

    def on_tokens(problem: int, sample: int, new: list[int]) -> None:
        streamed.setdefault((problem, sample), []).extend(new)

    sampling = SamplingSettings(max_new_tokens=40)
    quiet = engine.generate(problems_of(EDGES), n=2, sampling=sampling, seed=0)
    groups = engine.generate(problems_of(EDGES), n=2, sampling=sampling, seed=0, on_tokens=on_tokens)
    assert streamed == {(p, s): r.token_ids for p, group in enumerate(groups) for s, r in enumerate(group)}
    assert tokens(groups) == tokens(quiet)


def test_pages_come_back_and_prompts_share_them(
    root: Path, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
):
    from kitae.rollout import native

    most, made = 0, []

    class Watched(native.Pages):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            made.append(self)

        def take(self, count: int) -> list[int]:
            nonlocal most
            taken = super().take(count)
            most = max(most, self.num_in_use)
            return taken

    monkeypatch.setattr(native, "Pages", Watched)
    engine = engine_of(policy_of(folder_of(root, "qwen3")), kernels, max_rows=32, stop_ids=())
    engine.generate(problems_of([330]), n=32, sampling=SamplingSettings(max_new_tokens=6), seed=0)
    assert made[0].num_in_use == 0
    assert most == 20 + 32  # the prompt's 20 full pages once, and one page for each row's end


def test_more_pages_than_foreseen_change_nothing(
    root: Path, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
):
    from kitae.rollout import pages

    engine = engine_of(policy_of(folder_of(root, "qwen3")), kernels, max_rows=6)
    expected = engine.generate(problems_of(EDGES), n=3, sampling=SamplingSettings(max_new_tokens=50), seed=0)
    monkeypatch.setattr(pages, "FIRST_BYTES", 1)
    found = engine.generate(problems_of(EDGES), n=3, sampling=SamplingSettings(max_new_tokens=50), seed=0)
    assert [[(r.token_ids, r.logprobs) for r in g] for g in found] == [
        [(r.token_ids, r.logprobs) for r in g] for g in expected
    ]


def test_a_thousand_queued_requests_all_finish(root: Path, kernels: ctypes.CDLL):
    problems = problems_of([1 + i % 7 for i in range(1000)])
    engine = engine_of(policy_of(folder_of(root, "qwen3")), kernels, max_rows=64)
    groups = engine.generate(problems, n=1, sampling=SamplingSettings(max_new_tokens=3), seed=0)
    assert [group[0].problem for group in groups] == problems
    assert all(len(group[0].token_ids) == 3 or group[0].token_ids[-1] == STOP for group in groups)


def test_prompts_that_do_not_fit_the_context_are_refused(root: Path, kernels: ctypes.CDLL):
    engine = engine_of(policy_of(folder_of(root, "qwen3")), kernels)
    with pytest.raises(ConfigError, match=r"context is 512; lower max_new_tokens to 12"):
        engine.generate(problems_of([500]), n=1, sampling=SamplingSettings(max_new_tokens=13), seed=0)
    engine.generate(problems_of([500]), n=1, sampling=SamplingSettings(max_new_tokens=12), seed=0)
    with pytest.raises(DataError, match="no tokens to continue from"):
        engine.generate([Problem(prompt="", token_ids=[])], n=1, sampling=SamplingSettings(), seed=0)


@pytest.mark.parametrize("wrong", [-1, 1_000_000])
def test_a_token_that_the_model_has_not_is_refused(root: Path, kernels: ctypes.CDLL, wrong: int):
    engine = engine_of(policy_of(folder_of(root, "qwen3")), kernels)
    problem = Problem(prompt="", token_ids=[3, wrong, 4])
    with pytest.raises(ModelError, match=f"token id {wrong} is none of the model's"):
        engine.generate([problem], n=1, sampling=SamplingSettings(max_new_tokens=2), seed=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights_stop_the_run(root: Path, kernels: ctypes.CDLL, value: float):
    policy = load_policy(
        ModelSettings(name_or_path=str(folder_of(root, "llama")), dtype="float32", device="cpu"),
        trainable=False,
    )
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight[7:9] = value
    for changes in ({}, {"temperature": 0}, {"top_p": 0.5}):
        sampling = SamplingSettings(max_new_tokens=9, **changes)
        with pytest.raises(NonFiniteError, match=r"not finite after 3 tokens of prompt 0"):
            engine_of(policy, kernels).generate(problems_of([3]), n=1, sampling=sampling, seed=0)


def test_sessions_of_one_engine_keep_out_of_each_others_pages(root: Path, kernels):
    engine = engine_of(policy_of(folder_of(root, "qwen3")), kernels)
    sampling = SamplingSettings(temperature=0, max_new_tokens=40)
    long, short = problems_of([40]), problems_of([5])
    expected = engine.generate(long, n=1, sampling=sampling, seed=1)[0][0].token_ids
    first, second = engine.open_session(longest=80), engine.open_session(longest=80, max_rows=1)
    (request,) = first.add(long[0], limits=[40], sampling=sampling)
    first.step()
    second.add(short[0], limits=[20], sampling=sampling)
    while not (first.is_idle and second.is_idle):
        for session in (second, first):
            session.step(within_s=0.0)
    assert request.token_ids == expected


def test_a_head_that_names_tokens_the_embedding_has_not_is_left_to_the_generic_engine(root: Path):
    policy = load_policy(
        ModelSettings(
            name_or_path=str(folder_of(root, "heads of 128, untied")), dtype="float32", device="cpu"
        ),
        trainable=False,
    )
    embedding = policy.causal_lm.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight[:-1])
    assert "331 outputs, and its embedding 330 rows" in str(why_not_native(policy))


def test_pages_for_which_there_is_no_memory_are_an_error_that_says_what_to_do(
    root: Path, kernels, monkeypatch
):
    engine = engine_of(policy_of(folder_of(root, "qwen3")), kernels)
    monkeypatch.setattr(HostPages, "resize", lambda self, count: torch.empty(1 << 60))
    with pytest.raises(
        PlanError, match=r"sampling ran out of memory \(.*allocat.*\); let fewer .*inference_batch_size"
    ):
        engine.generate(
            problems_of([40]), n=1, sampling=SamplingSettings(temperature=0, max_new_tokens=4), seed=1
        )
