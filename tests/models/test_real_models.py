"""A real pretrained model, and real configurations, against published numbers."""

from __future__ import annotations

import pytest
import torch

from kitae.config import ModelSettings
from kitae.models import estimate
from kitae.models.families import find_family
from kitae.models.load import _load_config, load_policy, load_tokenizer
from tests.models.conftest import batch_of
from tests.models.test_load import rewrite
from kitae.types import Row

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
def stories(shared_data, tmp_path):
    """The real 260k-parameter Llama, with its expected greedy ids."""
    folder = shared_data / "models" / "stories260K"
    return ModelSettings(name_or_path=str(folder), device="cpu", dtype="float32")


def expected_ids(settings, shared_data):
    tokenizer = load_tokenizer(settings)
    text = (shared_data / "models" / "stories260K_expected_greedy_200.txt").read_text()
    return tokenizer, text


def test_a_real_llama_writes_its_known_story(stories, shared_data):
    policy = load_policy(stories, trainable=False)
    tokenizer, text = expected_ids(stories, shared_data)
    ids = [1]
    with torch.no_grad():
        for _ in range(199):
            batch = batch_of([Row(token_ids=[*ids, 0], loss_mask=[False] * len(ids) + [True])])
            hidden = policy.hidden(batch.input_ids_T, batch.positions_T, batch.packing)
            ids.append(int(policy.logits(hidden[len(ids) - 1 : len(ids)]).argmax()))
    story = tokenizer.decode(ids[1:]).strip()
    assert text.strip().startswith(story[:100])
    assert story[:600] == text.strip()[:600]


def test_a_real_llamas_perplexity_is_the_known_one(stories, shared_data):
    policy = load_policy(stories, trainable=False)
    tokenizer, text = expected_ids(stories, shared_data)
    ids = tokenizer.encode(text.strip("\n"), add_special_tokens=False)
    row = Row(token_ids=[1, *ids], loss_mask=[False] + [True] * len(ids))
    with torch.no_grad():
        logprobs, _ = policy(batch_of([row]))
    assert -logprobs.mean().item() == pytest.approx(0.473418, abs=2e-3)
