"""Two gloo ranks with uneven rows and tokens against one process. The ranks are started once for all tests."""

import json
import sys
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file

from kitae.parallel.launch import launch
from kitae.parallel.world import World


@pytest.fixture(scope="module")
def models(tiny) -> dict[str, str]:
    return {family: str(tiny(family)) for family in ("qwen3", "llama", "deepseek_v3")}


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    code = launch(
        [json.dumps(models), str(folder)], nproc_per_node=2, program=[sys.executable, ranks.__file__]
    )
    assert code == 0
    return folder


def report(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"report.{rank}").read_text())


@pytest.mark.parametrize("name", [name for name in ranks.CASES if "bfloat16" not in name])
def test_two_ranks_with_uneven_tokens_equal_one_process(two_ranks, models, name):
    metrics, expected = ranks.train(ranks.CASES[name], models, World())
    for rank in (0, 1):
        theirs = report(two_ranks, rank)["metrics"][name]
        for step in range(2):
            assert theirs[step] == pytest.approx(metrics[step], rel=1e-5)
        tensors = load_file(two_ranks / f"{name}.{rank}")
        holds_weights = rank == 0 or any(key.startswith("weight.") for key in tensors)
        for key, value in expected.items():
            if holds_weights or not key.startswith("weight."):
                torch.testing.assert_close(
                    tensors[key], value, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
                )


@pytest.mark.parametrize("name", ["bfloat16", "moe_bfloat16"])
def test_two_ranks_in_bfloat16_keep_float32_shards_and_save_as_one_process_does(two_ranks, models, name):
    metrics, expected = ranks.train(ranks.CASES[name], models, World())
    theirs = report(two_ranks, 0)["metrics"][name]
    assert [m["loss"] for m in theirs] == pytest.approx([m["loss"] for m in metrics], rel=2e-3)
    assert [m["grad_norm"] for m in theirs] == pytest.approx([m["grad_norm"] for m in metrics], rel=2e-2)
    tensors = load_file(two_ranks / f"{name}.0")
    routers = [key for key in expected if key.startswith("weight.") and key.endswith("mlp.gate.weight")]
    assert [tensors[key].dtype for key in routers] == [torch.float32] * (name == "moe_bfloat16")
    for key, value in expected.items():
        if key.startswith("weight."):
            assert tensors[key].dtype == value.dtype
            torch.testing.assert_close(tensors[key], value, rtol=0.02, atol=0.002)
        if key.startswith("gradient."):
            assert tensors[key].dtype == torch.float32


def test_metrics_are_the_same_on_every_rank(two_ranks):
    assert report(two_ranks, 0)["metrics"] == report(two_ranks, 1)["metrics"]


def test_collectives_of_tensors_and_json_values(two_ranks):
    for rank in (0, 1):
        told = report(two_ranks, rank)
        assert told["sum"] == [2.0, 1.0]
        assert told["gathered"] == [{"rank": 0, "text": "é"}, {"rank": 1, "text": "é" * 51}]
        assert told["broadcast"] == ["from 0", None, 0.1]


def test_each_rank_continues_from_its_own_shard_to_the_last_bit(two_ranks):
    assert report(two_ranks, 0)["restored"] and report(two_ranks, 1)["restored"]


def test_a_nan_on_one_rank_stops_all_in_the_same_step(two_ranks):
    told = [report(two_ranks, rank)["nonfinite"] for rank in (0, 1)]
    assert told[0] == told[1]
    assert "step 1: the loss became nan in forward pass 1 of 2 on rank 1; no weight was changed" in told[0]
