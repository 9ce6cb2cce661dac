"""What a resume compares beside settings and data: the machine, its CPU's instruction sets included."""

from __future__ import annotations

import torch

from kitae.parallel.world import World
from kitae.train import identity

PLAIN = "model name\t: Fast 7 CPU\nflags\t\t: fpu avx512f"
WITH_BFLOAT16 = PLAIN + " avx512_bf16"


def known(monkeypatch, features: str, device: str = "cpu") -> dict:
    monkeypatch.setattr(identity, "cpu_features", lambda: features)
    return identity.identity(settings={}, facts={}, world=World(device=torch.device(device)))


def test_a_cpu_of_the_same_name_with_other_instructions_is_another_machine(monkeypatch):
    before, after = known(monkeypatch, PLAIN), known(monkeypatch, WITH_BFLOAT16)
    [difference] = identity.differences(before, after)
    assert difference.startswith("machine.cpu Fast 7 CPU, features ")
    assert difference.count("Fast 7 CPU") == 2
    assert not identity.differences(before, known(monkeypatch, PLAIN))


def test_the_host_of_an_accelerator_may_change(monkeypatch):
    assert not identity.differences(
        known(monkeypatch, PLAIN, device="cuda"), known(monkeypatch, WITH_BFLOAT16, device="cuda")
    )


def test_a_system_that_says_nothing_of_its_cpu_has_a_name_all_the_same(monkeypatch):
    monkeypatch.setattr(identity.platform, "machine", lambda: "arm64")
    assert known(monkeypatch, "unknown")["machine"]["cpu"].startswith("arm64, features ")
