"""Latent attention and routed experts in the native engine, held to what test_native.py holds dense models to."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from kitae import compiler
from kitae.config import LoraSettings, ModelSettings, SamplingSettings
from kitae.errors import NonFiniteError
from kitae.models.load import load_policy
from kitae.models.policy import Policy
from kitae.models.toy import make_config
from kitae.rollout import build
from kitae.rollout.generic import GenericEngine
from kitae.rollout.shapes import why_not_native
from kitae.types import Rollout
from tests.rollout.test_native import (
    EDGES,
    STOP,
    VOCABULARY,
    differences,
    engine_of,
    policy_of,
    problems_of,
    require_same_bits_in_any_company,
    spell,
    tokens,
)

ODD = {
    "hidden_size": 75, "intermediate_size": 101, "moe_intermediate_size": 37, "num_attention_heads": 5,
    "num_key_value_heads": 5, "kv_lora_rank": 80, "q_lora_rank": 40, "v_head_dim": 48, "qk_nope_head_dim": 38,
    "qk_rope_head_dim": 12, "n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3,
}  # fmt: skip
V2 = {
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": None, "v_head_dim": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.3,
}  # fmt: skip
MOE = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts": 9, "num_experts_per_tok": 3,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
    "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "v3": {},
    "v3, no query latent": {"q_lora_rank": None},
    "v3, halves rotated": {"rope_interleave": False},
    "v3, yarn": {"rope_parameters": YARN},
    "v3, biases, shares not normalised": {"attention_bias": True, "norm_topk_prob": False},
    "v3, odd sizes": ODD,
    "v3, no shared expert, every layer routed": {"n_shared_experts": 0, "first_k_dense_replace": 0},
    "v2, greedy": {"family": "deepseek_v2", **V2, "topk_method": "greedy"},
    "v2, best groups, yarn": {
        "family": "deepseek_v2", **V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "q_lora_rank": 24, "rope_parameters": YARN,
    },
    "qwen3": {"family": "qwen3_moe", **MOE, "norm_topk_prob": True},
    "qwen3, one dense layer": {"family": "qwen3_moe", **MOE, "norm_topk_prob": False, "mlp_only_layers": [0]},
}  # fmt: skip
SOME = ["v3", "v3, odd sizes", "v2, best groups, yarn", "qwen3"]


def config_of(shape: str) -> Any:
    import transformers

    sizes = {
        "initializer_range": 0.15,
        "max_position_embeddings": 512,
        "num_hidden_layers": 2,
        "bos_token_id": None,
        "eos_token_id": STOP,
        "pad_token_id": 0,
        **SHAPES[shape],
    }
    family = sizes.pop("family", "deepseek_v3")
    if family == "deepseek_v3":
        return make_config(family, vocab_size=VOCABULARY, **sizes)
    kind = transformers.DeepseekV2Config if family == "deepseek_v2" else transformers.Qwen3MoeConfig
    return kind(vocab_size=VOCABULARY, **sizes)


@functools.cache
def folder_of(root: Path, shape: str) -> Path:
    """A random model whose biases and norms, and what balances its experts, are random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias") or "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    folder = root / shape.replace(" ", "-")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native-experts")


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_generate_whatever_the_sizes(root: Path, kernels: ctypes.CDLL, shape: str):
    from transformers import AutoModelForCausalLM

    folder = folder_of(root, shape)
    # transformers' grouped products want sizes that 16 bytes divide
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    problems = problems_of(EDGES)
    expected = []
    for problem in problems:
        ids = torch.tensor([problem.token_ids])
        out = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=STOP, pad_token_id=0)
        expected.append(out[0, ids.shape[1] :].tolist())
    policy = policy_of(folder)
    assert why_not_native(policy) is None
    sampling = SamplingSettings(temperature=0, max_new_tokens=20)
    groups = engine_of(policy, kernels, max_rows=5).generate(problems, n=2, sampling=sampling, seed=0)
    assert tokens(groups) == [[ids, ids] for ids in expected]


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_are_those_of_the_learner(root: Path, kernels: ctypes.CDLL, shape: str):
    policy = policy_of(folder_of(root, shape))
    sampling = SamplingSettings(temperature=0.7, max_new_tokens=40)
    groups = engine_of(policy, kernels, max_rows=9).generate(
        problems_of(EDGES), n=4, sampling=sampling, seed=1
    )
    ratio_N = differences(policy, groups, temperature=sampling.temperature).exp()
    assert len(ratio_N) > 200
    assert (ratio_N - 1).abs().max().item() <= 1e-5


def kept(groups: list[list[Rollout]]) -> list[list[int]]:
    """Of each token of all rollouts, the ids that top-p left."""
    return [ids for group in groups for r in group for ids in r.kept_ids or []]


def test_it_draws_the_tokens_the_generic_engine_draws(root: Path, kernels: ctypes.CDLL):
    for shape in SOME:
        policy = policy_of(folder_of(root, shape))
        generic = GenericEngine(policy, stop_ids=(STOP,), decode=spell, max_rows=8)
        for sampling in (SamplingSettings(max_new_tokens=30), SamplingSettings(top_p=0.9, max_new_tokens=12)):
            ours, theirs = (
                engine.generate(problems_of(EDGES), n=3, sampling=sampling, seed=5)
                for engine in (engine_of(policy, kernels), generic)
            )
            assert tokens(ours) == tokens(theirs)
            edges = [len(set(a) ^ set(b)) for a, b in zip(kept(ours), kept(theirs), strict=True)]
            # Rounding may put the token at the edge of top-p on either side.
            assert max(edges, default=0) <= 1
            assert sum(edges) <= 0.01 * len(edges)


@pytest.mark.parametrize("shape", SOME)
def test_in_bfloat16_log_probs_are_nearer_to_the_exact_ones_than_the_learners(
    root: Path, kernels: ctypes.CDLL, shape: str
):
    """Most tokens differ by rounding; a few by much, where a router's choice is so close that rounding tips it."""
    folder = folder_of(root, shape)
    policy = policy_of(folder, dtype="bfloat16")
    groups = engine_of(policy, kernels, max_rows=9).generate(
        problems_of(EDGES), n=4, sampling=SamplingSettings(max_new_tokens=30), seed=1
    )
    exact = load_policy(
        ModelSettings(name_or_path=str(folder), dtype="float32", device="cpu"), trainable=False
    )
    with torch.no_grad():
        for name, parameter in exact.causal_lm.named_parameters():
            if name not in policy.float32_names:
                parameter.copy_(parameter.bfloat16().float())
    learners_N, ours_N = (differences(p, groups, temperature=1.0) for p in (policy, exact))
    assert ours_N.abs().median().item() <= 0.03
    assert ours_N.abs().median().item() <= learners_N.abs().median().item()
    assert ours_N.abs().mean().item() <= (learners_N - ours_N).abs().mean().item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["v3", "v2, best groups, yarn", "qwen3"])
def test_a_completion_has_the_same_bits_in_any_company(
    root: Path, kernels: ctypes.CDLL, dtype: str, shape: str
):
    policy = policy_of(folder_of(root, shape), dtype=dtype)
    engine = functools.partial(engine_of, policy, kernels)
    require_same_bits_in_any_company(engine, max_new_tokens=16, mixes=17)


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="elsewhere the kernels are the portable ones anyway"
)
def test_kernels_for_older_cpus_compute_the_same(
    root: Path, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
):
    older = [f if not f.startswith("-march") else "-march=x86-64-v2" for f in compiler.FLAGS]
    monkeypatch.setattr(compiler, "FLAGS", older)
    portable = build.load_kernels()
    assert portable._name != kernels._name
    for shape in SOME:
        policy = policy_of(folder_of(root, shape))
        sampling = SamplingSettings(max_new_tokens=3)
        ours, theirs = (
            engine_of(policy, k).generate(problems_of(EDGES), n=2, sampling=sampling, seed=4)
            for k in (kernels, portable)
        )
        assert tokens(ours) == tokens(theirs)
        for group, other in zip(ours, theirs, strict=True):
            for a, b in zip(group, other, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize("shape", SOME)
def test_sync_takes_the_present_weights(root: Path, kernels: ctypes.CDLL, shape: str):
    policy = load_policy(
        ModelSettings(name_or_path=str(folder_of(root, shape)), dtype="float32", device="cpu")
    )
    engine = engine_of(policy, kernels)
    engine.sync()
    with torch.no_grad():
        for _, tensor in [*policy.named_parameters(), *policy.named_buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.02)
    before = engine.generate(problems_of([4]), n=1, sampling=SamplingSettings(max_new_tokens=16), seed=0)
    assert differences(policy, before, temperature=1.0).abs().max().item() > 1e-3
    engine.sync()
    groups = engine.generate(problems_of(EDGES), n=2, sampling=SamplingSettings(max_new_tokens=16), seed=0)
    assert differences(policy, groups, temperature=1.0).abs().max().item() <= 1e-5


@pytest.mark.parametrize("shape", SOME)
def test_adapters_are_merged_into_experts_and_linears(root: Path, kernels: ctypes.CDLL, shape: str):
    policy = load_policy(
        ModelSettings(name_or_path=str(folder_of(root, shape)), dtype="float32", device="cpu"),
        lora=LoraSettings(rank=4, alpha=8, dropout=0),
    )
    assert why_not_native(policy) is None
    engine = engine_of(policy, kernels)
    moved = []
    with torch.no_grad():
        for name, parameter in policy.named_trainable():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.03)
                moved.append(name)
    assert {"experts", "o_proj"} <= {part for name in moved for part in name.split(".")}
    sampling = SamplingSettings(max_new_tokens=20)
    groups = engine.generate(problems_of(EDGES), n=2, sampling=sampling, seed=0)
    assert differences(policy.eval(), groups, temperature=1.0).abs().max().item() <= 1e-5
    with policy.without_adapter():
        engine.sync()
        start = engine.generate(problems_of([20]), n=2, sampling=sampling, seed=0)
        assert differences(policy, start, temperature=1.0).abs().max().item() <= 1e-5
    assert differences(policy, start, temperature=1.0).abs().mean().item() > 1e-3


def test_float16_is_computed_in_float32(root: Path, kernels: ctypes.CDLL):
    folder = folder_of(root, "qwen3")
    policy = policy_of(folder, dtype="float16")
    assert why_not_native(policy) is None
    groups = engine_of(policy, kernels).generate(
        problems_of(EDGES), n=2, sampling=SamplingSettings(max_new_tokens=20), seed=0
    )
    exact = load_policy(
        ModelSettings(name_or_path=str(folder), dtype="float32", device="cpu"), trainable=False
    )
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.half().float())
    assert differences(exact, groups, temperature=1.0).abs().mean().item() <= 1e-3  # angles in float16
    assert differences(policy, groups, temperature=1.0).abs().mean().item() <= 0.01


@pytest.mark.parametrize("part", ["gate.weight", "experts.down_proj", "kv_b_proj.weight"])
def test_broken_weights_stop_the_run(root: Path, kernels: ctypes.CDLL, part: str):
    policy = load_policy(
        ModelSettings(name_or_path=str(folder_of(root, "v3")), dtype="float32", device="cpu"), trainable=False
    )
    with torch.no_grad():
        for name, parameter in policy.causal_lm.named_parameters():
            if name.endswith(part):
                parameter.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="not finite after 3 tokens"):
        engine_of(policy, kernels).generate(
            problems_of([3]), n=2, sampling=SamplingSettings(max_new_tokens=9), seed=0
        )


@pytest.mark.parametrize(
    ("shape", "changes", "reason"),
    [
        ("v3", {"kv_lora_rank": 24}, "its kv_lora_rank is 24, which 16 does not divide"),
        ("v3", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("v3", {"topk_group": 1, "num_experts_per_tok": 5}, "are too few to choose 5"),
        ("qwen3", {"head_dim": 24}, "its head size is 24, which 16 does not divide"),
    ],
)
def test_what_the_kernels_cannot_run_is_said(
    tmp_path: Path, shape: str, changes: dict[str, Any], reason: str
):
    from transformers import AutoModelForCausalLM

    config = config_of(shape)
    for name, value in changes.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    policy: Policy = policy_of(tmp_path)
    assert reason in str(why_not_native(policy))


def test_a_family_the_kernels_do_not_know_is_named(tmp_path: Path):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, sliding_window=None, **sizes)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    assert "mistral is none of qwen2, qwen3" in str(why_not_native(policy_of(tmp_path)))
