"""Which engine is taken, and what the log and the errors say about it."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kitae.config import ModelSettings, SamplingSettings, SeamSettings
from kitae.errors import ConfigError
from kitae.models.load import load_policy
from kitae.models.policy import Policy
from kitae.models.toy import make_model
from kitae.rollout import choose, shapes
from kitae.rollout.build import BuildError
from kitae.rollout.choose import LocalEngine, open_engine
from kitae.rollout.generic import GenericEngine
from kitae.rollout.native import NativeEngine
from kitae.types import Problem

MANY = 1e9
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
WINDOW = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"],
}


def policy_of(folder: Path, **settings: Any) -> Policy:
    how = {"dtype": "float32", "device": "cpu", **settings}
    return load_policy(ModelSettings(name_or_path=str(folder), **how), trainable=False)


def name_of(policy: Policy, wanted: Any = "auto", *, tokens: float = MANY) -> str:
    chosen = open_engine(
        policy,
        wanted=wanted,
        setting="rollout.engine",
        expected_tokens=tokens,
        stop_ids=[2],
        decode=str,
        max_rows=4,
    )
    assert isinstance(chosen.engine, NativeEngine) == (chosen.name == "native")
    return chosen.name


def test_auto_takes_native_for_a_long_run_only(
    tiny: Callable[..., Path], kernels: ctypes.CDLL, caplog: pytest.LogCaptureFixture
):
    policy = policy_of(tiny("qwen3"))
    with caplog.at_level(logging.INFO, logger="kitae.rollout"):
        assert name_of(policy) == "native"
        assert "rollouts: native engine, 4 rows at a time, 1 threads (qwen3 in float32)" in caplog.text
        assert name_of(policy, tokens=1000) == "generic"
        assert "not the native engine: compiling it takes longer than sampling 1,000 tokens" in caplog.text
    assert name_of(policy, "native", tokens=1) == "native"
    assert name_of(policy, "generic") == "generic"


@pytest.mark.parametrize(
    ("family", "sizes", "settings", "reason"),
    [
        ("qwen3", {}, {"seams": SeamSettings(attention=False)}, "model.seams.attention is off"),
        ("qwen3", {"head_dim": 24}, {}, "its head size is 24"),
        ("qwen3", {}, {"quantization": "nf4"}, "this one has Linear4bit"),
        ("qwen3", {"hidden_act": "gelu"}, {}, "its activation is gelu"),
        ("llama", {"rope_parameters": DYNAMIC}, {}, "its rotary embedding is dynamic"),
        ("qwen3", WINDOW, {}, "some of its layers attend in a window"),
        ("deepseek_v3", {"kv_lora_rank": 24}, {}, "its kv_lora_rank is 24"),
    ],
)
def test_what_the_kernels_cannot_run_is_generic_and_says_why(
    tmp_path: Path,
    kernels: ctypes.CDLL,
    caplog: pytest.LogCaptureFixture,
    family: Any,
    sizes: dict[str, Any],
    settings: dict[str, Any],
    reason: str,
):
    if "quantization" in settings:
        pytest.importorskip("bitsandbytes")
    policy = policy_of(make_model(tmp_path, family, **sizes), **settings)
    with caplog.at_level(logging.INFO, logger="kitae.rollout"):
        assert name_of(policy) == "generic"
    assert "rollouts: not the native engine: " in caplog.text
    assert reason in caplog.text
    with pytest.raises(
        ConfigError, match=r"^rollout.engine is native, but .*set it to auto or generic$"
    ) as error:
        name_of(policy, "native")
    assert reason in str(error.value)


def test_without_a_compiler_auto_is_generic(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse() -> ctypes.CDLL:
        raise BuildError("there is no C++ compiler (g++ or c++)")

    monkeypatch.setattr(choose, "load_kernels", refuse)
    policy = policy_of(tiny("qwen3"))
    with caplog.at_level(logging.INFO, logger="kitae.rollout"):
        assert name_of(policy) == "generic"
    assert "not the native engine: its kernels could not be compiled: there is no C++ compiler" in caplog.text
    with pytest.raises(ConfigError, match="could not be compiled: there is no"):
        name_of(policy, "native")


def engine_of(policy: Policy, **how: Any) -> LocalEngine:
    return open_engine(
        policy,
        **{"wanted": "auto", "setting": "rollout.engine", "expected_tokens": 1.0, "max_rows": 4} | how,
        stop_ids=[2],
        decode=str,
    ).engine


def test_int8_insists_on_the_native_engine_and_says_why_it_cannot_have_it(
    tiny: Callable[..., Path],
    kernels: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    policy = policy_of(tiny("qwen3"))
    monkeypatch.setattr(choose, "is_fast_here", lambda: False)
    with caplog.at_level(logging.INFO, logger="kitae.rollout"):
        assert isinstance(engine_of(policy, quantization="int8"), NativeEngine)
    assert "(qwen3 in float32, linear weights in int8)" in caplog.text
    assert "this CPU has no avx512_vnni; sampling in int8 saves memory there, and no time" in caplog.text
    with pytest.raises(
        ConfigError, match=r"rollout.quantization is int8 and rollout.engine generic, but only"
    ):
        engine_of(policy, quantization="int8", wanted="generic")
    other = policy_of(tiny("qwen3"), seams=SeamSettings(attention=False))
    said = "rollout.quantization is int8, which needs the native engine, and that cannot .*: model.seams.attention is off"
    with pytest.raises(ConfigError, match=said):
        engine_of(other, quantization="int8")
    monkeypatch.setattr(shapes, "MOST_INPUTS", 100)
    with pytest.raises(
        ConfigError, match="one of its layers has 128 inputs, and integer sums hold no more than 100"
    ):
        engine_of(policy, quantization="int8")


def test_a_budget_of_keys_and_values_is_the_native_engines(
    tiny: Callable[..., Path], kernels: ctypes.CDLL, caplog: pytest.LogCaptureFixture
):
    policy = policy_of(tiny("qwen3"))
    assert isinstance(engine_of(policy, kv_cache_tokens=64), GenericEngine)
    assert (
        "rollouts: rollout.kv_cache_tokens has no effect: the generic engine keeps a place as long"
        in caplog.text
    )
    with pytest.raises(ConfigError, match=r"rollout.kv_cache_tokens is 64 and rollout.engine generic"):
        engine_of(policy, kv_cache_tokens=64, wanted="generic")
    session = engine_of(policy, kv_cache_tokens=64, wanted="native").open_session()
    with pytest.raises(ConfigError, match=r"rollout\.kv_cache_tokens is 64"):
        session.add(Problem(prompt="", token_ids=[5] * 40), limits=[26], sampling=SamplingSettings())


def test_a_larger_model_pays_sooner(tiny: Callable[..., Path]):
    small, large = policy_of(tiny("qwen3")), policy_of(tiny("qwen3", hidden_size=256, intermediate_size=2048))
    assert [choose.pays(policy, tokens=300_000) for policy in (small, large)] == [False, True]
    assert [choose.pays(policy, tokens=3_000_000) for policy in (small, large)] == [True, True]
