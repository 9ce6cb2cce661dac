"""A critic on two gloo ranks with uneven rows, one of them idle in a case, against one process."""

import json
import sys
from pathlib import Path

import critic_ranks
import pytest
import torch
from safetensors.torch import load_file

from kitae.parallel.launch import launch
from kitae.parallel.world import World


@pytest.fixture(scope="module")
def models(tiny) -> dict[str, str]:
    return {family: str(tiny(family)) for family in ("qwen3", "llama", "deepseek_v3")}


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory) -> Path:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("critic-ranks")
    arguments = [json.dumps(models), str(folder)]
    assert launch(arguments, nproc_per_node=2, program=[sys.executable, critic_ranks.__file__]) == 0
    return folder


@pytest.mark.parametrize("name", critic_ranks.CASES)
def test_two_ranks_train_a_critic_as_one_process_does(two_ranks, models, name):
    metrics, expected = critic_ranks.train(critic_ranks.CASES[name], models, World())
    is_exact = "bfloat16" not in name
    how = {"rtol": 1e-4, "atol": 2e-5} if is_exact else {"rtol": 0.05, "atol": 0.05}
    for rank in (0, 1):
        theirs = json.loads((two_ranks / f"report.{rank}").read_text())[name]
        for step in range(3):
            assert theirs[step]["loss"] == pytest.approx(
                metrics[step]["loss"], rel=1e-4 if is_exact else 0.02
            )
        tensors = load_file(two_ranks / f"{name}.{rank}")
        for key, value in expected.items():
            if rank == 0 or key in tensors:
                assert tensors[key].dtype == value.dtype, key
                torch.testing.assert_close(tensors[key], value, **how, msg=lambda m, k=key: f"{k}: {m}")
    assert expected["values"].std() > 0
    heads = [value for key, value in expected.items() if "score" in key]
    assert len(heads) == 1 and heads[0].dtype == torch.float32
