"""kitae on one CUDA device: the numbers of every path are those of the CPU. Skipped where there is no such device."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import COMPARED, methods, read_method, train

from kitae import backends
from kitae.config import ModelSettings, SamplingSettings
from kitae.export.convert import How, bf16_to_fp8, fp8_to_bf16
from kitae.models.load import load_policy
from kitae.rollout.choose import Chosen, open_engine
from kitae.rollout.generic import GenericEngine
from kitae.rollout.page_cache import attend_slowly
from kitae.types import Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
STEPS = 5
SHARP = {"initializer_range": 0.2}
"""Random weights large enough that likely and unlikely tokens differ clearly."""


def short(device: str, **model: object) -> dict:
    return {
        "model": {"device": device, **model},
        "train": {"max_steps": STEPS},
        "log": {"steps": 1},
    }


def trace(lines: list[dict]) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k.startswith(COMPARED)} for line in lines]


def far_off(found: list[dict], expected: list[dict], *, within: float) -> list[str]:
    assert len(found) == len(expected) == STEPS
    return [
        f"step {number}: {name} is {here.get(name)}, not {value}"
        for number, (here, there) in enumerate(zip(found, expected, strict=True), 1)
        for name, value in there.items()
        if not math.isclose(here.get(name, math.nan), value, rel_tol=within, abs_tol=within)
    ]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", methods())
def test_a_method_has_the_numbers_it_has_on_a_cpu(name, kind, toy_files, tmp_path):
    runs = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        lines = train(read_method(name), files=toy_files, output_dir=folder, kind=kind, changes=short(device))
        runs[device] = trace(lines)
    assert not far_off(runs["cuda"], runs["cpu"], within=2e-3)


@pytest.mark.parametrize("name", ["sft", "grpo", "dpo"])
def test_qlora_has_about_the_numbers_it_has_on_a_cpu(name, toy_files, tmp_path):
    pytest.importorskip("bitsandbytes")
    runs = {}
    for device in ("cpu", "cuda"):
        lines = train(
            read_method(name),
            files=toy_files,
            output_dir=tmp_path / device,
            kind="qlora",
            changes=short(device),
        )
        runs[device] = trace(lines)[:1]  # from there on they differ by their rounding
        assert len(lines) == STEPS
    (found,), (expected,) = runs["cuda"], runs["cpu"]
    loss, as_on_a_cpu = found["train/loss"], expected["train/loss"]
    assert math.isclose(loss, as_on_a_cpu, rel_tol=0.02, abs_tol=0.02), (loss, as_on_a_cpu)


@pytest.mark.parametrize("how", ["true", "offload", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputing_and_offloading_change_no_number(how, dtype, toy_files, tmp_path):
    runs = []
    for setting in (False, True if how == "true" else how):
        changes = short("cuda", dtype=dtype, gradient_checkpointing=setting)
        folder = tmp_path / str(setting)
        runs.append(trace(train(read_method("sft"), files=toy_files, output_dir=folder, changes=changes)))
    assert not far_off(*runs, within=1e-4 if dtype == "float32" else 2e-2)


def test_the_loss_falls_under_the_8bit_optimizer(toy_files, tmp_path):
    pytest.importorskip("bitsandbytes")
    changes = short("cuda") | {"optim": {"name": "adamw_8bit"}}
    lines = train(read_method("sft"), files=toy_files, output_dir=tmp_path / "run", changes=changes)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def problems_of(lengths: list[int]) -> list[Problem]:
    numbers = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 100, (n,), generator=numbers).tolist() for n in lengths]
    return [Problem(prompt="", token_ids=ids, index=i) for i, ids in enumerate(drawn)]


def engine_on(device: str, folder: Path, *, wanted: str, **more: Any) -> Chosen:
    settings = ModelSettings(name_or_path=str(folder), dtype="float32", device=device)
    return open_engine(
        load_policy(settings, trainable=False),
        wanted=wanted,
        setting="engine",
        expected_tokens=1e9,
        stop_ids=[2],
        decode=str,
        max_rows=5,
        **more,
    )


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1}, {"temperature": 0.8, "top_p": 0.9}]
)
@pytest.mark.parametrize("engine", ["generic", "paged"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "deepseek_v3"])
def test_tokens_are_those_of_the_cpu(family, engine, sampling, tiny):
    """Beside which other rows run, enter and end; and of a second session, which has its steps recorded already."""
    how = SamplingSettings(max_new_tokens=40, **sampling)
    problems, folder = problems_of([3, 17, 64, 1, 130, 63, 65]), tiny(family, **SHARP)
    expected = engine_on("cpu", folder, wanted="generic").engine.generate(problems, n=2, sampling=how, seed=0)
    on_gpu = engine_on("cuda", folder, wanted=engine)
    assert on_gpu.name == engine
    for _ in range(2):
        found = on_gpu.engine.generate(problems, n=2, sampling=how, seed=0)
        assert [[r.token_ids for r in g] for g in found] == [[r.token_ids for r in g] for g in expected]
        for group, others in zip(found, expected, strict=True):
            for a, b in zip(group, others, strict=True):
                torch.testing.assert_close(
                    torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-3
                )


def test_a_small_budget_of_keys_and_values_changes_no_token(tiny):
    how, problems = SamplingSettings(max_new_tokens=40), problems_of([3, 17, 64, 1, 130, 63, 65])
    folder = tiny("qwen3", **SHARP)
    runs = [
        engine_on("cuda", folder, wanted="paged", kv_cache_tokens=tokens).engine.generate(
            problems, n=3, sampling=how, seed=0
        )
        for tokens in (None, 256)
    ]
    few, many = ([[r.token_ids for r in group] for group in run] for run in runs)
    assert few == many


def test_recorded_steps_see_weights_that_have_changed(tiny):
    how, problems = SamplingSettings(max_new_tokens=20, temperature=0), problems_of([5, 9])
    engine = engine_on("cuda", tiny("qwen3", **SHARP), wanted="paged").engine
    before = engine.generate(problems, n=1, sampling=how, seed=0)
    with torch.no_grad():
        for parameter in engine.policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    after = engine.generate(problems, n=1, sampling=how, seed=0)
    fresh = GenericEngine(engine.policy, stop_ids=[2], decode=str, max_rows=5)
    expected = fresh.generate(problems, n=1, sampling=how, seed=0)
    assert [r.token_ids for (r,) in after] == [r.token_ids for (r,) in expected]
    assert [r.token_ids for (r,) in after] != [r.token_ids for (r,) in before]


def test_a_recording_that_fails_leaves_the_stream_as_it_was():
    x, own = torch.ones(4, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        backends.of(x.device).record(lambda: x * x.sum().item())
    assert torch.cuda.current_stream() == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [16, 64, 80, 128, 192])
def test_blocks_give_the_formulas_values_and_gradients(head_size, dtype, monkeypatch):
    from kitae.models import triton_blocks

    how = {"head_size": head_size, "dtype": dtype, "device": torch.device("cuda")}
    assert triton_blocks.why_not(**how) is None
    plain = triton_blocks.plain_rotary
    monkeypatch.setattr(
        triton_blocks, "plain_rotary", lambda x, norm, cos, sin, e: plain(x, norm, cos, -sin, e)
    )
    assert "give other numbers here" in triton_blocks.why_not(**how)


def test_blocks_graphs_and_growing_memory_are_in_use(toy_files, tmp_path):
    train(
        read_method("grpo"),
        files=toy_files,
        output_dir=tmp_path / "run",
        changes=short("cuda", dtype="bfloat16"),
    )
    log = (tmp_path / "run" / "train.log").read_text()
    assert "Triton" not in log, "they were refused"
    assert "rollouts: paged engine" in log and "cannot be recorded" not in log, log
    assert any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(4, 2, 64, 64), (12, 2, 128, 128), (32, 8, 80, 80), (16, 16, 192, 128), (7, 1, 16, 16)]
)
def test_attention_over_pages(shape, dtype):
    from kitae.rollout.triton_attention import attend

    queries, heads, size, value_size = shape
    lengths, pages = [1, 15, 16, 17, 64, 255, 256, 257, 1000, 4097], 300
    drawn = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=drawn, device="cuda").to(dtype)

    q, keys, values = (
        normal(len(lengths), queries, size),
        normal(pages, 16, heads, size),
        normal(pages, 16, heads, value_size),
    )
    tables = torch.stack([torch.randperm(pages, generator=drawn, device="cuda") for _ in lengths]).int()
    given = (q, keys, values, tables, torch.tensor(lengths, device="cuda") - 1, size**-0.5)
    found, expected = attend(*given).double(), attend_slowly(*given).double()
    off = ((found - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))).tolist()
    assert max(off) < (1e-5 if dtype == torch.float32 else 1e-2), dict(zip(lengths, off, strict=True))


def test_fp8_conversion_gives_the_cpus_bits(tmp_path, tiny):
    model = tiny("deepseek_v3", hidden_size=256, intermediate_size=384)
    runs = {}
    for device in ("cpu", "cuda"):
        eight, sixteen = tmp_path / device / "fp8", tmp_path / device / "bf16"
        bf16_to_fp8(str(model), How(output=eight, device=torch.device(device)))
        fp8_to_bf16(str(eight), How(output=sixteen, device=torch.device(device)))
        runs[device] = [
            f.read_bytes() for folder in (eight, sixteen) for f in sorted(folder.glob("*.safetensors"))
        ]
    assert runs["cuda"] == runs["cpu"]


def test_a_run_resumed_on_cuda_has_the_bits_of_one_that_went_through(toy_files, tmp_path):
    def run(folder: Path, steps: int, **more) -> list[dict]:
        changes = short("cuda", dtype="bfloat16") | {"save": {"steps": 2}} | more
        changes |= {"train": {"max_steps": steps}, "optim": {"lr_scheduler": "constant"}}
        train(read_method("sft"), files=toy_files, output_dir=folder, changes=changes)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "cut", 4)
    again = run(tmp_path / "cut", 6, resume=True, allow_inexact=True)
    assert [line["train/loss"] for line in again] == [line["train/loss"] for line in whole]


def test_flex_attention_was_tried_and_is_on(toy_files, tmp_path):
    train(
        read_method("sft"),
        files=toy_files,
        output_dir=tmp_path / "run",
        changes=short("cuda", dtype="bfloat16"),
    )
    log = (tmp_path / "run" / "train.log").read_text()
    assert "attention: FlexAttention" in log, log
