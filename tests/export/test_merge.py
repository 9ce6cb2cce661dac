"""Merged weights against peft's own merge_and_unload and against base plus adapter, in every layout."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kitae.config import LoraSettings, ModelSettings
from kitae.errors import ConfigError, ModelError
from kitae.export.convert import How, bf16_to_fp8, fp8_to_bf16, merge
from kitae.models.load import load_policy
from kitae.models.save import save_policy
from tests.export.conftest import slow_dequantize, slow_quantize, tensors_of, write_model

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
FAMILIES = ["qwen3", "llama", "deepseek_v3"]


def randomize(module, *, seed=0):
    """Give the adapter, and what else trains, values as after training."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.add_(noise.to(parameter.dtype))


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")


def bf16_copy(folder, target):
    """The model in BF16, written by transformers."""
    load(folder, torch.bfloat16).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, target / name)
    return target


def kitae_adapter(base, target, **settings):
    """An adapter on everything, saved by kitae as a run saves it."""
    model = ModelSettings(name_or_path=str(base), device="cpu", dtype="float32")
    policy = load_policy(model, lora=LoraSettings(rank=4, **settings))
    randomize(policy.causal_lm)
    save_policy(policy, target)
    return target


def peft_adapter(base, target, **settings):
    """An adapter that kitae had no hand in."""
    wrapped = get_peft_model(load(base), LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings}))
    randomize(wrapped)
    wrapped.save_pretrained(target)
    return target


def unloaded(base, adapter):
    """peft's merge in float32, saved and read again under the names of files."""
    wrapped = PeftModel.from_pretrained(load(base), adapter)
    with torch.no_grad():
        logits = wrapped(IDS).logits
    return wrapped.merge_and_unload(), logits


def check(base, adapter, target, *, has_new_head=False, **options):
    """Merge, and compare tensors with peft's merge and logits with base plus adapter; the report."""
    report = merge(str(adapter), How(output=target, num_workers=2), **options)
    reference, logits = unloaded(base, adapter)
    reference.save_pretrained(target.with_name("reference"))
    expected, found, before = (tensors_of(f) for f in (target.with_name("reference"), target, base))
    assert found.keys() - expected.keys() <= ({"lm_head.weight"} if has_new_head else set())
    assert expected.keys() <= found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == before.get(name, tensor).dtype
        step = 2**-8 if found[name].dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found[name].float(), tensor, rtol=step, atol=1e-6, msg=name)
    is_bf16 = any(t.dtype == torch.bfloat16 for t in found.values())
    with torch.no_grad():
        merged = load(target)(IDS).logits
    assert (merged - logits).abs().max() < (0.05 if is_bf16 else 1e-4) * logits.abs().max()
    with torch.no_grad():
        assert (merged - load(base)(IDS).logits).abs().max() > 0.1 * logits.abs().max()
    changed = [n for n in found if n not in before or not torch.equal(found[n], before[n])]
    assert report["changed"] == len(changed)
    return report


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kitae_adapter_merges_as_peft_merges_it(family, kind, tiny, tmp_path):
    base = tiny(family) if kind == "float32" else bf16_copy(tiny(family), tmp_path / "base")
    report = check(base, kitae_adapter(base, tmp_path / "adapter", use_rslora=True), tmp_path / "out")
    # Of DeepSeek's second layer: 8 experts x 3, 3 shared, 5 of attention; the router is a parameter of its own.
    assert report["changed"] == {"qwen3": 14, "llama": 14, "deepseek_v3": 8 + 24 + 8}[family]
    assert report["adapted"] == report["changed"]


def test_bf16_is_rounded_once_from_float32(tiny, tmp_path):
    base = bf16_copy(tiny("llama"), tmp_path / "base")
    adapter = kitae_adapter(base, tmp_path / "adapter")
    merge(str(adapter), How(output=tmp_path / "out"))
    lora, before, found = (tensors_of(f) for f in (adapter, base, tmp_path / "out"))
    name = "model.layers.1.mlp.up_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
    exact = before[f"{name}.weight"].double() + 4.0 * (b.double() @ a.double())  # alpha 16, rank 4
    merged = found[f"{name}.weight"]
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-9).all()  # half a step of 8 bits
    assert (merged == exact.bfloat16()).float().mean() > 0.999
    twice = before[f"{name}.weight"] + (4.0 * (b @ a)).bfloat16()
    assert (twice == exact.bfloat16()).float().mean() < 0.9


@pytest.mark.parametrize(
    "settings",
    [
        {
            "target_modules": ["q_proj", "down_proj"],
            "alpha_pattern": {"down_proj": 3},
            "rank_pattern": {"q_proj": 2},
        },
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "k_proj"], "lora_alpha": 32, "use_rslora": True},
    ],
)
def test_plain_peft_adapters_merge_as_peft_merges_them(settings, tiny, tmp_path):
    base = tiny("llama")
    check(base, peft_adapter(base, tmp_path / "adapter", **settings), tmp_path / "out")


@pytest.mark.parametrize("settings", [{"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}])
def test_biases_are_merged(settings, tiny, tmp_path):
    base = tiny("qwen2")
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], **settings)
    report = check(base, adapter, tmp_path / "out")
    assert report["changed"] == {"lora_only": 8, "all": 10}.get(settings.get("bias"), 8)


def test_a_bias_the_base_has_not_is_refused(tiny, tmp_path):
    base = tiny("llama")
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(
        ModelError, match=r"lora_B\.bias .* \(the base has no model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        merge(str(adapter), How(output=tmp_path / "out"))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings_are_parted_when_an_adapter_changes_one_of_them(target, tiny, tmp_path, caplog):
    base = tiny("qwen3")
    assert "lm_head.weight" not in tensors_of(base)
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj", target])
    caplog.set_level(logging.WARNING)
    merge(str(adapter), How(output=tmp_path / "out"))
    assert "now gets its own" in caplog.text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    wrapped = PeftModel.from_pretrained(load(base), adapter)
    with torch.no_grad():
        expected, found = wrapped(IDS).logits, load(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_tied_embeddings_stay_tied_when_no_adapter_touches_them(tiny, tmp_path):
    base = tiny("qwen3")
    merge(str(kitae_adapter(base, tmp_path / "adapter")), How(output=tmp_path / "out"))
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def per_expert(adapter, target, *, inter):
    """The same adapter as an older transformers would have it: every expert a linear of its own."""
    target.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if ".mlp.experts." not in name or ".lora_A." not in name:
            if ".mlp.experts." not in name:
                found[name] = a
            continue
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        place = name.partition(".experts")[0] + ".experts"
        is_down = a.shape[1] == inter
        for e in range(8):
            a_e = a[e * 4 : (e + 1) * 4]
            b_e = b[:, e::8]
            halves = {"down_proj": b_e} if is_down else {"gate_proj": b_e[:inter], "up_proj": b_e[inter:]}
            for part, rows in halves.items():
                found[f"{place}.{e}.{part}.lora_A.weight"] = a_e.clone()
                found[f"{place}.{e}.{part}.lora_B.weight"] = rows.contiguous()
    save_file(found, target / "adapter_model.safetensors")
    shutil.copy(adapter / "adapter_config.json", target / "adapter_config.json")
    return target


def test_adapters_of_single_experts_equal_those_of_fused_ones(tiny, tmp_path):
    base = tiny("deepseek_v3")
    fused = kitae_adapter(base, tmp_path / "fused")
    merge(str(fused), How(output=tmp_path / "a"))
    merge(str(per_expert(fused, tmp_path / "single", inter=32)), How(output=tmp_path / "b"))
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


def fused_base(base, target):
    """The same base with each layer's experts in one tensor, as some checkpoints have them."""
    tensors, place = tensors_of(base), "model.layers.1.mlp.experts"

    def take(part):
        return torch.stack([tensors.pop(f"{place}.{e}.{part}.weight") for e in range(8)])

    tensors[f"{place}.gate_up_proj"] = torch.cat([take("gate_proj"), take("up_proj")], 1)
    tensors[f"{place}.down_proj"] = take("down_proj")
    return write_model(target, tensors, config=json.loads((base / "config.json").read_text()))


def test_a_base_whose_experts_are_stored_as_one_tensor_merges_alike(tiny, tmp_path):
    base = tiny("deepseek_v3")
    adapter = kitae_adapter(base, tmp_path / "adapter")
    merge(str(adapter), How(output=tmp_path / "a"))
    merge(str(adapter), How(output=tmp_path / "b"), base=str(fused_base(base, tmp_path / "fused")))
    a, b = tensors_of(fused_base(tmp_path / "a", tmp_path / "c")), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_merging_into_fp8_shards(dtype, tiny, tmp_path):
    """The sum is made in float32 from the dequantized weight, and rounded once; what has no adapter stays as it is."""
    base = tmp_path / "base"
    bf16_to_fp8(str(tiny("deepseek_v3", hidden_size=144)), How(output=base))
    adapter = kitae_adapter(base, tmp_path / "adapter", target_modules=["o_proj", "gate_proj", "up_proj"])
    with pytest.raises(ConfigError, match="scale_format is ue8m0, but the FP8 weights"):
        merge(str(adapter), How(output=tmp_path / "out"), dtype="fp8", scale_format="ue8m0")
    report = merge(str(adapter), How(output=tmp_path / "out"), dtype=dtype)
    before, found, lora = (tensors_of(f) for f in (base, tmp_path / "out", adapter))
    for name, tensor in before.items():
        if name.endswith("_scale_inv"):
            continue
        module = name.removesuffix(".weight")
        a = lora.get(f"base_model.model.{module}.lora_A.weight")
        scale = before.get(f"{name}_scale_inv")
        if scale is None:
            assert torch.equal(found[name], tensor)
        elif a is not None:
            exact = slow_dequantize(tensor, scale) + 4.0 * (
                lora[f"base_model.model.{module}.lora_B.weight"] @ a
            )
            if dtype == "auto":
                torch.testing.assert_close(found[name].float(), exact, rtol=2**-8, atol=1e-6)
            else:
                again = slow_dequantize(found[name], found[f"{name}_scale_inv"])
                expected = slow_dequantize(*slow_quantize(exact))
                assert ((again - expected).abs() <= exact.abs() * 2**-3 + 1e-3).all()
                assert (again == expected).float().mean() > 0.99
        elif "experts." not in name and dtype == "auto":
            assert torch.equal(found[name], slow_dequantize(tensor, scale).bfloat16())
        elif "experts." not in name:
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
            assert torch.equal(found[f"{name}_scale_inv"], scale)
    # o_proj, dense layer, shared experts, experts; gate and up each.
    assert report["changed"] == 2 + 2 + 2 + 16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in config) == (dtype == "fp8")
    settings = ModelSettings(name_or_path=str(tmp_path / "out"), device="cpu", dtype="bfloat16")
    load_policy(settings, trainable=False)


def test_a_bf16_base_can_be_merged_into_fp8_at_once(tiny, tmp_path):
    base = bf16_copy(tiny("qwen3"), tmp_path / "base")
    adapter = kitae_adapter(base, tmp_path / "adapter")
    merge(str(adapter), How(output=tmp_path / "fp8"), dtype="fp8")
    merge(str(adapter), How(output=tmp_path / "bf16"))
    fp8_to_bf16(str(tmp_path / "fp8"), How(output=tmp_path / "back"))
    direct, back = tensors_of(tmp_path / "bf16"), tensors_of(tmp_path / "back")
    assert direct.keys() == back.keys()
    for name, tensor in direct.items():
        bound = tensor.float().abs() * 2**-3 + tensor.float().abs().max() * 2**-14
        assert ((tensor.float() - back[name].float()).abs() <= bound).all(), name


SMALL = {
    "vocab_size": 112, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_other_models_with_experts_merge_as_peft_merges_them(family, tmp_path):
    import transformers

    config = {
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **SMALL, num_experts=4, moe_intermediate_size=24, head_dim=8
        ),
        "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    }[family]()
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    assert any(".experts.3." in name for name in tensors_of(base))
    adapter = peft_adapter(
        base,
        tmp_path / "adapter",
        target_modules=["q_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        alpha_pattern={"experts.down_proj": 3},
    )
    assert check(base, adapter, tmp_path / "out")["changed"] == 2 * (2 + 4 * 3)


# what is refused -----------------------------------------------------------------------------------------------


def test_an_untrained_adapter_is_refused(tiny, tmp_path):
    model = ModelSettings(name_or_path=str(tiny()), device="cpu", dtype="float32")
    save_policy(load_policy(model, lora=LoraSettings(rank=4)), tmp_path / "adapter")
    with pytest.raises(ModelError, match="changes nothing: all its B are zero"):
        merge(str(tmp_path / "adapter"), How(output=tmp_path / "out"))


def test_an_adapter_lost_in_rounding_is_refused_and_leaves_nothing(tiny, tmp_path):
    base = bf16_copy(tiny("llama"), tmp_path / "base")
    adapter = kitae_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file({n: t * 1e-12 if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=r"no tensor changed: .* lost in the rounding"):
        merge(str(adapter), How(output=tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_another_models_adapter_is_refused_with_names_and_shapes(tiny, tmp_path):
    adapter = kitae_adapter(tiny("llama"), tmp_path / "adapter")
    wide = tiny("llama", hidden_size=128)
    with pytest.raises(ModelError, match=r"does not fit this base; without a place there") as caught:
        merge(str(adapter), How(output=tmp_path / "out"), base=str(wide))
    place = "model.layers.0.mlp.gate_proj"
    wrong = f"{place}.lora_A.weight [4, 64] (B A is [128, 64], {place}.weight is [128, 128])"
    assert wrong in str(caught.value)
    assert "and 11 more" in str(caught.value)
    with pytest.raises(ModelError, match=r"nor experts of these shapes there"):
        merge(str(adapter), How(output=tmp_path / "out"), base=str(tiny("deepseek_v3")))
    with pytest.raises(ModelError, match=r"of the family llama, and .* is of qwen3; name a base of its own"):
        merge(str(adapter), How(output=tmp_path / "out"), base=str(tiny("qwen3")))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def edited(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "has use_dora, which kitae does not merge"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "gives scores"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices"),
    ],
)
def test_what_peft_means_otherwise_is_refused(changes, message, tiny, tmp_path):
    adapter = kitae_adapter(tiny(), tmp_path / "adapter")
    edited(adapter, **changes)
    with pytest.raises(ModelError, match=message):
        merge(str(adapter), How(output=tmp_path / "out"))


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_a_pair_and_nan_are_refused(part, tiny, tmp_path):
    adapter = kitae_adapter(tiny(), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if part in n and "q_proj" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(ModelError, match="its partner is missing"):
        merge(str(adapter), How(output=tmp_path / "out"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ModelError, match=rf"{part}\.weight has values that are NaN"):
        merge(str(adapter), How(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_or_an_adapter_on_an_adapter_is_refused(tiny, tmp_path):
    with pytest.raises(ModelError, match="so there is no adapter to merge"):
        merge(str(tiny()), How(output=tmp_path / "out"))
    adapter = kitae_adapter(tiny(), tmp_path / "adapter")
    with pytest.raises(ModelError, match="is an adapter itself"):
        merge(str(adapter), How(output=tmp_path / "out"), base=str(adapter))
    with pytest.raises(ModelError, match="is an adapter; merge it first"):
        bf16_to_fp8(str(adapter), How(output=tmp_path / "out"))
    with pytest.raises(ConfigError, match="--dequantize has no effect"):
        merge(str(adapter), How(output=tmp_path / "out"), dequantize=True)


# a base in 4 bits ----------------------------------------------------------------------------------------------


@pytest.fixture
def four_bits(tiny, tmp_path):
    """A llama, the same in 4 bits, and an adapter that names the latter."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    plain = bf16_copy(tiny("llama"), tmp_path / "plain")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "packed")
    adapter = kitae_adapter(plain, tmp_path / "adapter")
    edited(adapter, base_model_name_or_path=str(tmp_path / "packed"))
    return plain, tmp_path / "packed", adapter


def test_a_base_in_4_bits_asks_for_the_original(four_bits, tmp_path):
    plain, _, adapter = four_bits
    with pytest.raises(
        ModelError, match=r"is stored in 4 bits; name the full-precision model .* with --base"
    ):
        merge(str(adapter), How(output=tmp_path / "out"))
    merge(str(adapter), How(output=tmp_path / "out"), base=str(plain))
    edited(adapter, base_model_name_or_path=str(plain))
    merge(str(adapter), How(output=tmp_path / "same"))
    a, b = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "same")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_an_adapter_trained_on_4_bits_is_merged_into_full_precision(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = tiny("llama", hidden_size=128)
    model = ModelSettings(name_or_path=str(base), device="cpu", dtype="float32", quantization="nf4")
    policy = load_policy(model, lora=LoraSettings(rank=4))
    randomize(policy.causal_lm)
    save_policy(policy, tmp_path / "adapter")
    check(base, tmp_path / "adapter", tmp_path / "out")


def test_a_base_in_4_bits_is_dequantized_when_told_to(four_bits, tmp_path, caplog):
    import bitsandbytes as bnb

    _, packed, adapter = four_bits
    caplog.set_level(logging.WARNING)
    report = merge(str(adapter), How(output=tmp_path / "out"), dequantize=True)
    assert "dequantized from 4 bits" in caplog.text and report["changed"] == 14
    found, lora = tensors_of(tmp_path / "out"), tensors_of(adapter)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    name = "model.layers.1.mlp.up_proj"
    weight = AutoModelForCausalLM.from_pretrained(packed).get_submodule(name).weight
    whole = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    exact = whole + 4.0 * (
        lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"]
    )
    torch.testing.assert_close(found[f"{name}.weight"].float(), exact, rtol=2**-8, atol=1e-6)
    load(tmp_path / "out")


# what comes along ----------------------------------------------------------------------------------------------


def test_the_adapters_tokenizer_template_and_settings_come_along(tiny, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny("llama"), base)
    (base / "special_tokens_map.json").write_text("{}")
    (base / "LICENSE").write_text("free")
    adapter = kitae_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge(str(adapter), How(output=tmp_path / "plain"))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (tmp_path / "plain" / name).read_bytes() == (base / name).read_bytes()

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "kitae_template.json"):
        (adapter / name).write_text(f"the adapter's {name}")
    for name in ("run.json", "metrics.jsonl"):
        (adapter / name).write_text("{}")
    merge(str(adapter), How(output=tmp_path / "own"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "kitae_template.json"):
        assert (tmp_path / "own" / name).read_text() == f"the adapter's {name}"
    names = {p.name for p in (tmp_path / "own").iterdir()}
    assert not names & {
        "special_tokens_map.json",
        "run.json",
        "metrics.jsonl",
        "adapter_config.json",
        "README.md",
    }
    assert {"LICENSE", "generation_config.json"} <= names
