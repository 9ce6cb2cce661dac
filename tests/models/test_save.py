"""Saved models load with transformers and give the same numbers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from kitae.config import ModelSettings
from kitae.models.load import load_policy
from kitae.models.save import save_policy
from tests.models.conftest import ALL_FAMILIES, batch_of, plain_nll, random_row

ROWS = [random_row(n) for n in (20, 9)]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_saved_model_loads_with_transformers_and_gives_the_same_log_probs(
    family, policy_of, tiny, plain_model, tmp_path
):
    policy, batch = policy_of(family), batch_of(ROWS)
    with torch.no_grad():
        for _, parameter in policy.named_trainable():
            parameter.mul_(1.25)
        expected = -policy(batch)[0].sum()
    files = save_policy(policy, tmp_path)
    assert {"config.json", "generation_config.json", "model.safetensors"} <= {f.name for f in files}
    with torch.no_grad():
        found = plain_nll(plain_model(family, path=tmp_path), ROWS)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    original = load_file(tiny(family) / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == original.keys()


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_the_learners_tensors_are_saved_in_the_policys_precision(family, tiny, tmp_path):
    policy = load_policy(ModelSettings(name_or_path=str(tiny(family)), dtype="bfloat16", device="cpu"))
    tensors = {n: torch.full(p.shape, 0.1 + i) for i, (n, p) in enumerate(policy.named_trainable())}
    save_policy(policy, tmp_path, tensors=tensors)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["model.norm.weight"].float(), tensors["model.norm.weight"].bfloat16().float())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    # A tied head must not keep the old values under a second name.
    assert ("lm_head.weight" in saved) == (family == "deepseek_v3")
    # transformers computes DeepSeek-V3's router in float32, and it stays so.
    wide = {n for n, t in saved.items() if t.dtype == torch.float32}
    router = {f"model.layers.1.mlp.gate.{n}" for n in ("weight", "e_score_correction_bias")}
    assert wide == (router if family == "deepseek_v3" else set())


def test_large_models_are_cut_into_shards_with_an_index(policy_of, plain_model, tmp_path):
    policy = policy_of("llama")
    files = save_policy(policy, tmp_path, max_shard_gib=100_000 / 2**30)
    assert sum(f.suffix == ".safetensors" for f in files) > 1
    assert (tmp_path / "model.safetensors.index.json") in files
    again = policy_of("llama", path=tmp_path)
    with torch.no_grad():
        assert torch.equal(again(batch_of(ROWS))[0], policy(batch_of(ROWS))[0])


def test_an_unknown_tensor_is_our_mistake(policy_of, tmp_path):
    with pytest.raises(AssertionError, match="no such parameters"):
        save_policy(policy_of(), tmp_path, tensors={"model.nothing": torch.zeros(1)})
