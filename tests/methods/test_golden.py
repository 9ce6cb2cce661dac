"""The first steps of every recipe give the numbers they gave before: fp32, one thread, every seam off."""

import json

import pytest
from methods import GOLDEN_STEPS, golden_trace, methods, read_method
from torch.backends.cpu import get_cpu_capability


@pytest.mark.parametrize("name", methods())
def test_golden_trace(name, toy_files, tmp_path):
    method = read_method(name)
    expected = json.loads(method.trace.read_text())
    assert len(expected) == GOLDEN_STEPS
    assert {"train/loss", "train/grad_norm"} <= set(expected[0])
    found = golden_trace(method, files=toy_files, output_dir=tmp_path / "run")
    # With AVX2 and AVX-512 the numbers are the same; torch adds up in another order where a CPU has neither.
    how = (
        {"rel": 1e-5, "abs": 1e-6}
        if get_cpu_capability() in ("AVX2", "AVX512")
        else {"rel": 1e-4, "abs": 1e-5}
    )
    for before, now in zip(expected, found, strict=True):
        assert {name: now.get(name) for name in before} == pytest.approx(before, **how), before["step"]
