"""The generic engine against transformers' generate, and against the policy that will learn from its rollouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kitae.config import ModelSettings, SamplingSettings, SeamSettings
from kitae.data.collate import collate
from kitae.errors import ConfigError, DataError, NonFiniteError
from kitae.models.load import load_policy
from kitae.models.policy import Policy
from kitae.rollout.generic import GenericEngine
from kitae.types import Problem, Rollout, Row

LENGTHS = [3, 17, 40, 1, 70]
# Random weights large enough that likely and unlikely tokens differ clearly.
SHARP = {"initializer_range": 0.2}
STOP = 2


def spell(ids: list[int]) -> str:
    return " ".join(map(str, ids))


@functools.cache
def policy_of(folder: Path, *, dtype: str = "float32", attention: bool = True) -> Policy:
    seams = SeamSettings(attention=attention)
    settings = ModelSettings(name_or_path=str(folder), dtype=dtype, device="cpu", seams=seams)
    return load_policy(settings, trainable=False)


def problems_of(lengths: list[int] = LENGTHS) -> list[Problem]:
    numbers = torch.Generator().manual_seed(0)
    return [
        Problem(prompt="", token_ids=torch.randint(3, 100, (n,), generator=numbers).tolist(), index=10 + i)
        for i, n in enumerate(lengths)
    ]


def rows_of(groups: list[list[Rollout]]) -> list[Row]:
    return [
        Row(
            token_ids=r.problem.token_ids + r.token_ids,
            loss_mask=[False] * len(r.problem.token_ids) + [True] * len(r.token_ids),
            prompt_length=len(r.problem.token_ids),
            streams={"old_logprobs": [0.0] * len(r.problem.token_ids) + r.logprobs},
            kept_ids=None if r.kept_ids is None else [[]] * len(r.problem.token_ids) + r.kept_ids,
        )
        for group in groups
        for r in group
    ]


def engine_of(policy: Policy, *, max_rows: int = 64, stop_ids: tuple[int, ...] = (STOP,)) -> GenericEngine:
    return GenericEngine(policy, stop_ids=stop_ids, decode=spell, max_rows=max_rows)


def tokens(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[r.token_ids for r in group] for group in groups]


def plain_greedy(folder: Path, problem: Problem, *, max_new_tokens: int) -> list[int]:
    """What transformers' generate continues the prompt with, and its end token."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([problem.token_ids])
    out = model.generate(
        ids, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=STOP, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("attention", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "deepseek_v3"])
def test_greedy_tokens_equal_generate(tiny: Callable[..., Path], family: str, attention: bool):
    folder = tiny(family, **SHARP)
    problems = problems_of()
    expected = [plain_greedy(folder, p, max_new_tokens=24) for p in problems]
    engine = engine_of(policy_of(folder, attention=attention), max_rows=5)
    rollouts = engine.generate(
        problems, n=2, sampling=SamplingSettings(temperature=0, max_new_tokens=24), seed=0
    )
    assert tokens(rollouts) == [[ids, ids] for ids in expected]


def test_the_story_model_tells_its_story(shared_data: Path):
    from transformers import PreTrainedTokenizerFast

    folder = shared_data / "models" / "stories260K"
    text = (shared_data / "models" / "stories260K_expected_greedy_200.txt").read_text(encoding="utf-8")
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    policy = policy_of(folder)
    engine = GenericEngine(policy, stop_ids=[], decode=tokenizer.decode, max_rows=4)
    prompt = Problem(prompt="", token_ids=[policy.causal_lm.config.bos_token_id])
    sampling = SamplingSettings(temperature=0, max_new_tokens=200)
    (group,) = engine.generate([prompt], n=2, sampling=sampling, seed=0)
    assert [r.text.strip() for r in group] == [text.strip()] * 2


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(temperature=0.7, max_new_tokens=20),
        SamplingSettings(temperature=0.7, top_p=0.8, max_new_tokens=20),
        SamplingSettings(temperature=1.3, top_k=9, min_p=0.02, max_new_tokens=20),
    ],
    ids=["temperature", "top-p", "top-k and min-p"],
)
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_the_ratio_at_the_first_update_is_one(
    tiny: Callable[..., Path], family: str, sampling: SamplingSettings
):
    policy = policy_of(tiny(family, **SHARP))
    groups = engine_of(policy, max_rows=8).generate(problems_of(), n=4, sampling=sampling, seed=1)
    for batch in collate(rows_of(groups), rows_per_forward=7, temperature=sampling.temperature):
        with torch.no_grad():
            logprobs_N = policy(batch).logprobs_N
        ratio_N = (logprobs_N - batch.streams["old_logprobs"]).exp()
        assert (ratio_N - 1).abs().max().item() <= 1e-5


def test_kept_ids_hold_the_token_and_nothing_of_probability_zero(tiny: Callable[..., Path]):
    sampling = SamplingSettings(top_k=5, max_new_tokens=8)
    groups = engine_of(policy_of(tiny("qwen3", **SHARP))).generate(
        problems_of(), n=2, sampling=sampling, seed=0
    )
    for rollout in groups[0]:
        assert rollout.kept_ids is not None
        assert all(
            t in kept and len(kept) == 5 for t, kept in zip(rollout.token_ids, rollout.kept_ids, strict=True)
        )


def test_tokens_depend_neither_on_neighbours_nor_order_nor_rows_in_flight(tiny: Callable[..., Path]):
    policy = policy_of(tiny("qwen3", **SHARP))
    problems, sampling = problems_of(), SamplingSettings(max_new_tokens=16)
    expected = tokens(engine_of(policy).generate(problems, n=4, sampling=sampling, seed=7))
    for max_rows in (1, 3, 5, 8):
        assert (
            tokens(engine_of(policy, max_rows=max_rows).generate(problems, n=4, sampling=sampling, seed=7))
            == expected
        )
    assert (
        tokens(engine_of(policy).generate(problems[::-1], n=4, sampling=sampling, seed=7)) == expected[::-1]
    )
    alone = [engine_of(policy).generate([p], n=4, sampling=sampling, seed=7)[0] for p in problems]
    assert tokens(alone) == expected
    larger = tokens(engine_of(policy).generate(problems, n=6, sampling=sampling, seed=7))
    assert [group[:4] for group in larger] == expected
    plain = engine_of(policy_of(tiny("qwen3", **SHARP), attention=False), max_rows=3)
    assert tokens(plain.generate(problems, n=4, sampling=sampling, seed=7)) == expected


def test_seed_problem_and_sample_number_each_change_the_tokens(tiny: Callable[..., Path]):
    engine = engine_of(policy_of(tiny()))
    prompt = problems_of([9])[0].token_ids
    problems = [Problem(prompt="", token_ids=prompt, index=i) for i in range(2)]
    sampling = SamplingSettings(max_new_tokens=12)
    first, second = (tokens(engine.generate(problems, n=3, sampling=sampling, seed=s)) for s in (0, 1))
    completions = [tuple(ids) for groups in (first, second) for group in groups for ids in group]
    assert len(set(completions)) == 12


def test_a_group_larger_than_all_rows_is_sampled_whole(tiny: Callable[..., Path]):
    engine = engine_of(policy_of(tiny()), max_rows=4)
    groups = engine.generate(problems_of([6, 8]), n=11, sampling=SamplingSettings(max_new_tokens=6), seed=0)
    assert [len(group) for group in groups] == [11, 11]
    assert all(1 <= len(r.token_ids) == len(r.logprobs) <= 6 for group in groups for r in group)


def test_a_thousand_queued_requests_all_finish(tiny: Callable[..., Path]):
    problems = problems_of([1 + i % 7 for i in range(1000)])
    sampling = SamplingSettings(max_new_tokens=3)
    groups = engine_of(policy_of(tiny()), max_rows=64).generate(problems, n=1, sampling=sampling, seed=0)
    assert [group[0].problem for group in groups] == problems
    assert all(len(group[0].token_ids) == 3 or group[0].token_ids[-1] == STOP for group in groups)


def test_penalties_reach_back_into_the_prompt(tiny: Callable[..., Path]):
    folder = tiny("qwen3", **SHARP)
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sampling = SamplingSettings(
        temperature=0, repetition_penalty=1.4, no_repeat_ngram_size=2, max_new_tokens=20
    )
    for problem, (rollout,) in zip(
        problems_of(),
        engine_of(policy_of(folder)).generate(problems_of(), n=1, sampling=sampling, seed=0),
        strict=True,
    ):
        ids = torch.tensor([problem.token_ids])
        expected = model.generate(
            ids, max_new_tokens=20, do_sample=False, eos_token_id=STOP, pad_token_id=0,
            repetition_penalty=1.4, no_repeat_ngram_size=2,
        )  # fmt: skip
        assert rollout.token_ids == expected[0, ids.shape[1] :].tolist()


def test_a_completion_ends_at_a_stop_token_or_is_cut(tiny: Callable[..., Path]):
    policy = policy_of(tiny("qwen3", **SHARP))
    problem = Problem(prompt="", token_ids=problems_of([9])[0].token_ids, prefill="<think>\n")
    sampling = SamplingSettings(temperature=0, max_new_tokens=12)
    ((cut,),) = engine_of(policy, stop_ids=()).generate([problem], n=1, sampling=sampling, seed=0)
    assert (len(cut.token_ids), cut.finish_reason) == (12, "length")
    assert cut.text == "<think>\n" + spell(cut.token_ids)
    stop = cut.token_ids[5]
    first = cut.token_ids.index(stop)
    ((ended,),) = engine_of(policy, stop_ids=(99, stop)).generate([problem], n=1, sampling=sampling, seed=0)
    assert (ended.token_ids, ended.finish_reason) == (cut.token_ids[: first + 1], "stop")
    assert ended.text == "<think>\n" + spell(cut.token_ids[:first])
    assert ended.logprobs == pytest.approx(cut.logprobs[: first + 1], abs=1e-5)


def test_every_completion_can_have_a_limit_of_its_own(tiny: Callable[..., Path]):
    limits = [[1, 9], [4, 2], [3, 30], [5, 5], [2, 1]]
    groups = engine_of(policy_of(tiny()), max_rows=4, stop_ids=()).generate_up_to(
        limits, problems=problems_of(), sampling=SamplingSettings(), seed=0
    )
    assert [[len(r.token_ids) for r in group] for group in groups] == limits


def test_tokens_are_streamed_as_they_come(tiny: Callable[..., Path]):
    streamed: dict[tuple[int, int], list[int]] = {}

    def on_tokens(problem: int, sample: int, new: list[int]) -> None:
        streamed.setdefault((problem, sample), []).extend(new)

    groups = engine_of(policy_of(tiny()), max_rows=3).generate(
        problems_of(), n=2, sampling=SamplingSettings(max_new_tokens=7), seed=0, on_tokens=on_tokens
    )
    assert streamed == {(p, s): r.token_ids for p, group in enumerate(groups) for s, r in enumerate(group)}


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_bfloat16_rollouts_stay_close_to_the_policy_that_scores_them(tiny: Callable[..., Path], family: str):
    policy = policy_of(tiny(family), dtype="bfloat16")
    groups = engine_of(policy, max_rows=8).generate(
        problems_of(), n=2, sampling=SamplingSettings(max_new_tokens=12), seed=0
    )
    for rollout in (r for group in groups for r in group):
        prompt = rollout.problem.token_ids
        row = Row(
            token_ids=prompt + rollout.token_ids,
            loss_mask=[False] * len(prompt) + [True] * len(rollout.token_ids),
        )
        with torch.no_grad():
            logprobs_N = policy(collate([row], rows_per_forward=1)[0]).logprobs_N
        assert rollout.logprobs == pytest.approx(logprobs_N.tolist(), abs=0.1)


def test_a_prompt_that_could_outgrow_the_context_is_refused(tiny: Callable[..., Path]):
    engine = engine_of(policy_of(tiny("qwen3", max_position_embeddings=32)))
    with pytest.raises(ConfigError, match=r"prompt 1 \(row 11 .*context of 32 with 40 tokens"):
        engine.generate(problems_of([10, 40]), n=1, sampling=SamplingSettings(max_new_tokens=4), seed=0)
    with pytest.raises(ConfigError, match=r"together 33.*context is 32; lower max_new_tokens to 22"):
        engine.generate(problems_of([10]), n=1, sampling=SamplingSettings(max_new_tokens=23), seed=0)
    engine.generate(problems_of([10]), n=1, sampling=SamplingSettings(max_new_tokens=22), seed=0)
    with pytest.raises(DataError, match=r"no tokens to continue from"):
        engine.generate([Problem(prompt="", token_ids=[])], n=1, sampling=SamplingSettings(), seed=0)


def test_broken_weights_stop_the_run_instead_of_sampling_nonsense(tiny: Callable[..., Path]):
    policy = load_policy(ModelSettings(name_or_path=str(tiny()), dtype="float32", device="cpu"))
    policy.train()
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight.fill_(torch.nan)
    for sampling in (
        SamplingSettings(),
        SamplingSettings(temperature=0),
        SamplingSettings(top_p=0.5, top_k=3),
    ):
        with pytest.raises(NonFiniteError, match=r"not finite after 3 tokens of prompt 0"):
            engine_of(policy).generate(problems_of(), n=1, sampling=sampling, seed=0)
    assert policy.training


def test_sampling_leaves_the_policys_mode_and_gradients_as_they_were(tiny: Callable[..., Path]):
    policy = load_policy(ModelSettings(name_or_path=str(tiny()), dtype="float32", device="cpu"))
    for mode in (True, False):
        policy.train(mode)
        engine_of(policy).generate(problems_of(), n=1, sampling=SamplingSettings(max_new_tokens=2), seed=0)
        assert policy.training is mode
        assert all(p.grad is None and p.requires_grad for p in policy.parameters())


def test_no_problems_give_no_rollouts(tiny: Callable[..., Path]):
    assert engine_of(policy_of(tiny())).generate([], n=3, sampling=SamplingSettings(), seed=0) == []
    limits: list[list[int]] = [[], [2]]
    groups = engine_of(policy_of(tiny())).generate_up_to(
        limits, problems=problems_of([3, 4]), sampling=SamplingSettings(), seed=0
    )
    assert [len(group) for group in groups] == [0, 1]


@pytest.mark.parametrize("kind", ["Mamba2", "Gemma2", "Qwen3Next"])
def test_architectures_without_the_attention_seam_equal_generate(kind: str, tmp_path: Path):
    import transformers

    common = {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "eos_token_id": STOP, "bos_token_id": None,
        "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}
    sizes: dict[str, dict[str, Any]] = {
        "Mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "time_step_limit": (0.0, 9.0)},
        "Gemma2": {**attention, "sliding_window": 16},
        "Qwen3Next": {
            **attention, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        },
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**common, **sizes[kind])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    policy = load_policy(
        ModelSettings(name_or_path=str(tmp_path), dtype="float32", device="cpu"), trainable=False
    )
    assert not policy.seams.attention
    problems = problems_of([3, 30])
    sampling = SamplingSettings(temperature=0, max_new_tokens=24)
    groups = engine_of(policy, max_rows=2).generate(problems, n=3, sampling=sampling, seed=0)
    assert tokens(groups) == [[plain_greedy(tmp_path, p, max_new_tokens=24)] * 3 for p in problems]
