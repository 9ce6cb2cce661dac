"""The hardware protocol, on the machine at hand."""

from __future__ import annotations

import os

import pytest
import torch

from kitae import backends
from kitae.backends.cpu import BACKEND as CPU
from kitae.errors import ConfigError


def test_auto_takes_an_available_backend_and_cpu_is_always_there():
    assert backends.pick("auto").is_available()
    assert backends.pick("cpu") is CPU
    assert backends.pick_device("cpu") == torch.device("cpu")
    assert backends.of(torch.device("cpu")) is CPU


@pytest.mark.parametrize("name", ["cuda", "npu"])
def test_a_device_that_is_not_here_is_refused(name):
    if backends._load(name).is_available():
        assert backends.pick(name).name == name
        return
    with pytest.raises(ConfigError, match=f"this machine has no {name} device; use auto or cpu"):
        backends.pick(f"{name}:0")


def test_every_backend_names_its_process_group():
    assert {name: backends._load(name).process_group for name in ("cpu", "cuda", "npu")} == {
        "cpu": "gloo",
        "cuda": "nccl",
        "npu": "hccl",
    }


def test_memory_is_what_the_machine_has():
    device = torch.device("cpu")
    free, total = CPU.memory(device)
    assert 0 < free <= total
    assert 1 << 20 < CPU.peak_memory(device) < total


def test_the_generator_state_comes_back():
    device = torch.device("cpu")
    state = CPU.rng_state(device)
    CPU.seed(5)
    first = torch.rand(3)
    CPU.seed(5)
    assert torch.equal(torch.rand(3), first)
    CPU.set_rng_state(state, device)
    assert torch.equal(CPU.rng_state(device), state)


def test_a_features_answer_comes_with_its_reason():
    has, reason = CPU.supports("bfloat16")
    assert isinstance(has, bool)
    assert "this CPU has" in reason


def test_a_cpu_has_neither_triton_nor_recorded_work():
    for feature in ("triton", "recording"):
        assert CPU.supports(feature) == (False, "it is for GPUs")
    with pytest.raises(RuntimeError, match="cannot record"):
        CPU.record(lambda: torch.zeros(1))


@pytest.mark.parametrize("given", [[], ["PYTORCH_ALLOC_CONF"], ["PYTORCH_CUDA_ALLOC_CONF"]])
def test_memory_settings_of_the_user_are_left_alone(given, monkeypatch):
    """Under either name: torch reads one of them before the other, so setting that one would undo the user's."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "backend:native")  # restored at the end, whatever prepare() sets
        if name not in given:
            monkeypatch.delenv(name)
    backends._load("cuda").prepare()
    found = {name: os.environ[name] for name in names if name in os.environ}
    expected = dict.fromkeys(given, "backend:native") or dict.fromkeys(names, "expandable_segments:True")
    assert found == expected
