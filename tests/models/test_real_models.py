"""A real pretrained model, and real configurations, against published numbers."""

from __future__ import annotations

import pytest
import torch

from kitae.config import ModelSettings
from kitae.models import estimate
from kitae.models.families import find_family
from kitae.models.load import _load_config, load_policy, load_tokenizer
from kitae.types import Row
from tests.models.conftest import batch_of

PARAMETERS = {
    "hub/deepseek-ai--DeepSeek-V3": 671_026_404_352,
    "hub/deepseek-ai--DeepSeek-R1": 671_026_404_352,
    "hub/DeepSeek-V2-Lite": 15_706_484_224,
    "hub/Qwen--Qwen3-30B-A3B": 30_532_122_624,
    "composed/deepseek-ai--DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "composed/deepseek-ai--DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "composed/deepseek-ai--DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "composed/deepseek-ai--DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "composed/deepseek-ai--DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "composed/deepseek-ai--DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_real_configuration_has_the_published_number_of_parameters(name, shared_data, tmp_path):
    (tmp_path / "config.json").write_text((shared_data / "configs" / f"{name}_config.json").read_text())
    config = _load_config(tmp_path, trust_remote_code=False)
    assert not hasattr(config, "auto_map")
    meta = estimate.build_on_meta(config)
    found = estimate.estimate(meta, estimate.Plan(dtype=torch.bfloat16, trainable=False))
    assert found.parameters == PARAMETERS[name]
    assert found.weight_bytes == 2 * PARAMETERS[name]
    assert find_family(config.model_type).is_tested == ("V2-Lite" not in name)


def test_a_lora_on_every_linear_of_the_8b_distillation_has_the_known_size(shared_data, tmp_path):
    name = "composed/deepseek-ai--DeepSeek-R1-Distill-Llama-8B_config.json"
    (tmp_path / "config.json").write_text((shared_data / "configs" / name).read_text())
    meta = estimate.build_on_meta(_load_config(tmp_path, trust_remote_code=False))
    found = estimate.estimate(meta, estimate.Plan(dtype=torch.bfloat16, lora_rank=16))
    assert found.trainable == 41_943_040  # as peft prints for Llama 3 8B at rank 16
    nf4 = estimate.estimate(meta, estimate.Plan(dtype=torch.bfloat16, lora_rank=16, nf4=True))
    assert 5.4e9 < nf4.weight_bytes < 6.0e9


@pytest.fixture
def stories(shared_data):
    """The real 260k-parameter Llama."""
    folder = shared_data / "models" / "stories260K"
    return ModelSettings(name_or_path=str(folder), device="cpu", dtype="float32")


def known_row(settings, shared_data) -> Row:
    text = (shared_data / "models" / "stories260K_expected_greedy_200.txt").read_text().strip("\n")
    ids = load_tokenizer(settings).encode(text, add_special_tokens=False)
    return Row(token_ids=[1, *ids], loss_mask=[False] + [True] * len(ids))


def test_a_real_llama_writes_its_known_story(stories, shared_data):
    row = known_row(stories, shared_data)
    batch, policy = batch_of([row]), load_policy(stories, trainable=False)
    with torch.no_grad():
        hidden = policy.hidden(batch.input_ids_T, batch.positions_T, batch.packing)
        greedy = policy.logits(hidden[: len(row.token_ids) - 1]).argmax(-1)
    # Every token is the likeliest after those before it: exactly what greedy decoding gives.
    assert len(greedy) > 190
    assert greedy.tolist() == row.token_ids[1:]


def test_a_real_llamas_perplexity_is_the_known_one(stories, shared_data):
    policy = load_policy(stories, trainable=False)
    with torch.no_grad():
        logprobs, *_ = policy(batch_of([known_row(stories, shared_data)]))
    assert -logprobs.mean().item() == pytest.approx(0.473418, abs=1e-4)
