"""SFT then GRPO on each family, with the real R1-Distill tokenizer and GSM8K rows."""

import json
import os
from pathlib import Path

import pytest
import torch

from kitae.models.toy import make_model
from kitae.recipes import grpo, sft
from kitae.recipes._run import run_recipe

FAMILIES = ["qwen3", "llama", "deepseek_v3"]


@pytest.fixture(scope="module")
def real_tokenizer(shared_data):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(shared_data / "tokenizers" / "DeepSeek-R1-Distill-Qwen")


@pytest.fixture(scope="module")
def base(tmp_path_factory, real_tokenizer):
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(f"base-{family}")
            made[family] = make_model(
                folder, family, tokenizer=real_tokenizer, hidden_size=32, intermediate_size=64
            )
        return made[family]

    return make


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory, shared_data):
    lines = (shared_data / "math" / "gsm8k_train.jsonl").read_text().splitlines()[:16]
    path = tmp_path_factory.mktemp("gsm8k") / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def settings_for(recipe, tmp_path, model, data, *, lora=0, quantization="none", dtype="float32", **more):
    common = {
        "output_dir": str(tmp_path),
        "model": {"name_or_path": str(model), "dtype": dtype, "quantization": quantization},
        "lora": {"rank": lora},
        "data": {"train": [str(data)], "max_length": 256},
        "optim": {"learning_rate": 1e-3},
        "log": {"report_to": ["none"]},
    }
    if recipe is sft:
        common["train"] = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    else:
        common["train"] = {"max_steps": 2}
        common["rollout"] = {"prompts_per_round": 2, "num_generations": 3, "max_new_tokens": 6}
    for section, values in more.items():
        common[section] = {**common.get(section, {}), **values}
    return recipe.Settings.model_validate(common)


METRICS_PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()


def metrics_of(folder):
    """Every line of metrics.jsonl; each name in it must be explained in docs/metrics.md."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    unexplained = {name for line in lines for name in line if "/" in name and f"`{name}`" not in METRICS_PAGE}
    assert not unexplained
    return lines


@pytest.mark.parametrize("family", FAMILIES)
def test_full_sft_then_grpo_and_the_result_loads_in_transformers(family, base, gsm8k, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_recipe("sft", settings_for(sft, tmp_path / "sft", base(family), gsm8k))
    run_recipe("grpo", settings_for(grpo, tmp_path / "grpo", tmp_path / "sft", gsm8k, grpo={"kl_coef": 0.01}))
    steps = metrics_of(tmp_path / "grpo")
    assert [m["step"] for m in steps] == [1, 2]
    assert all(0 <= m["rollout/format_rate"] <= 1 for m in steps)
    assert abs(steps[0]["train/approx_kl"]) < 1e-6, "the ratio at the first update is not 1"
    assert steps[0]["train/kl"] == pytest.approx(0, abs=1e-6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grpo")
    before = AutoModelForCausalLM.from_pretrained(base(family))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "grpo") is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_full_sft_in_bfloat16_follows_float32_and_saves_bfloat16(family, base, gsm8k, tmp_path):
    from transformers import AutoModelForCausalLM

    losses = {}
    for dtype in ("float32", "bfloat16"):
        run_recipe("sft", settings_for(sft, tmp_path / dtype, base(family), gsm8k, dtype=dtype))
        losses[dtype] = [line["train/loss"] for line in metrics_of(tmp_path / dtype)]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-3)
    assert losses["bfloat16"] != losses["float32"], "nothing was computed in bfloat16"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="auto")
    assert saved.dtype == torch.bfloat16
    before = AutoModelForCausalLM.from_pretrained(base(family), dtype=torch.bfloat16)
    matrices = [name for name, weight in before.named_parameters() if weight.ndim > 1]
    same = [name for name in matrices if torch.equal(saved.get_parameter(name), before.get_parameter(name))]
    assert not same


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_sft_then_grpo_and_the_adapter_loads_in_peft(family, base, gsm8k, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run_recipe("sft", settings_for(sft, tmp_path / "sft", base(family), gsm8k, lora=4))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base(family)), tmp_path / "sft")
    moved = [n for n, p in adapted.named_parameters() if "lora_B" in n and p.abs().max() > 0]
    assert moved
    run_recipe(
        "grpo", settings_for(grpo, tmp_path / "grpo", tmp_path / "sft", gsm8k, lora=4, grpo={"kl_coef": 0.01})
    )
    assert metrics_of(tmp_path / "grpo")[0]["train/kl"] == pytest.approx(0, abs=1e-6), (
        "the reference is the start"
    )
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base(family)), tmp_path / "grpo")


@pytest.mark.parametrize("family", FAMILIES)
def test_qlora_sft_trains_and_its_adapter_loads_in_peft(family, base, gsm8k, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run_recipe("sft", settings_for(sft, tmp_path / "q", base(family), gsm8k, lora=4, quantization="nf4"))
    assert os.path.exists(tmp_path / "q" / "adapter_config.json")
    assert len(metrics_of(tmp_path / "q")) == 2
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base(family)), tmp_path / "q")
