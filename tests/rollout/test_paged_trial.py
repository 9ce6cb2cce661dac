"""Which policies the paged engine takes, tried on a CPU with the slow attention in the kernels' place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kitae import backends
from kitae.models.families import GENERIC
from kitae.models.toy import make_model
from kitae.rollout import paged_trial
from kitae.rollout.page_cache import attend_slowly
from kitae.rollout.paged_trial import waits_for_device, why_not_paged, why_not_the_same
from tests.rollout.test_generic import policy_of
from tests.rollout.test_paged import changeable

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "deepseek_v3"])
def test_a_step_over_pages_gives_what_whole_rows_give(family: str, tiny: Callable[..., Path]):
    assert why_not_the_same(policy_of(tiny(family)), attend=attend_slowly) is None


def test_a_step_that_gives_something_else_is_found_out(tiny: Callable[..., Path]):
    def forgetful(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, positions: Tensor, scaling: float):
        return attend_slowly(q, keys, values, tables, positions - 1, scaling)

    policy = policy_of(tiny("qwen3"))
    assert why_not_the_same(policy, attend=forgetful) == "its steps do not give what whole rows give"


def test_layers_that_are_not_as_the_configuration_says_are_found_out(tiny: Callable[..., Path]):
    policy = changeable(tiny("qwen3"))
    policy.causal_lm.config.num_key_value_heads = 3
    assert str(why_not_the_same(policy, attend=attend_slowly)).startswith("its steps do not run: ")


@pytest.mark.parametrize(
    ("family", "sizes", "waits"),
    [("llama", {}, False), ("llama", {"rope_parameters": DYNAMIC}, True), ("deepseek_v3", {}, True)],
)
def test_steps_that_read_something_from_the_device_are_known(
    family: Any, sizes: dict[str, Any], waits: bool, tmp_path: Path
):
    folder = make_model(tmp_path, family, **sizes)
    assert waits_for_device(policy_of(folder)) == waits


def test_what_the_device_lacks_is_said(tiny: Callable[..., Path]):
    assert why_not_paged(policy_of(tiny("qwen3"))) == "it runs on cpu, without triton (it is for GPUs)"


def test_seams_sharding_and_unknown_families_are_looked_at(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """As on a device that has all it needs, and an architecture that the tests do not prove is tried."""
    folder = tiny("qwen3")
    policy, plain = changeable(folder), policy_of(folder, attention=False)
    monkeypatch.setattr(type(backends.of(torch.device("cpu"))), "supports", lambda self, feature: (True, ""))
    monkeypatch.setattr(paged_trial, "_why_not_right", lambda policy: None)
    monkeypatch.setattr(paged_trial, "fast_attend", lambda: attend_slowly)
    assert why_not_paged(plain) == "model.seams.attention is off"
    assert why_not_paged(policy) is None
    monkeypatch.setattr(paged_trial, "why_not_the_same", lambda policy, attend: "tried")
    assert why_not_paged(policy) is None
    policy.family = dataclasses.replace(GENERIC, name="other")
    assert why_not_paged(policy) == "tried"
