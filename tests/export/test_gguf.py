"""GGUF files, run by llama.cpp itself: every family in several types says what the model says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import kitae as package
from kitae.cli.main import main
from kitae.errors import ConfigError, ModelError, RunDirError
from kitae.export import gguf as writer
from kitae.export.convert import How
from kitae.export.gguf import default_output, write_gguf
from kitae.export.gguf_read import open_gguf, write_back
from kitae.export.gguf_types import _gets_more_bits, find_type
from kitae.export.source import open_source
from kitae.export.verify_llama import run_llama_cpp

pytest.importorskip("gguf")
llama_cpp = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not __import__("importlib").util.find_spec("xllamacpp"),
    reason="llama.cpp is not installed; pip install 'kitae[gguf]'",
)

# Weights far larger than a fresh model's, so that positions, experts and every bit of attention matter to the logits.
LOUD = {"initializer_range": 0.15}
WIDE = {"hidden_size": 256, "intermediate_size": 512}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def answers(path: Path, ids: list[int], forced: list[int], *, size: int, lora: Path | None = None) -> dict:
    """Log-probabilities [len(forced), size] and greedy ids of llama.cpp."""
    said = run_llama_cpp(
        {
            "path": str(path), "context": 256, "threads": 1, "sequences": [[ids, forced]], "top": size,
            "max_tokens": 8, "stop_ids": [2, 5], "texts": ["hi <think> 1+2"], "add_special": False,
            "conversations": [[{"role": "user", "content": "hi"}]], "lora": None if lora is None else str(lora),
        }
    )  # fmt: skip
    logprobs = torch.full((len(forced), size), torch.nan)
    for i, (tokens, values) in enumerate(said["positions"][0]):
        logprobs[i, tokens] = torch.tensor(values)
    return {**said, "logprobs": logprobs}


def expected(folder: Path, ids: list[int], forced: list[int]) -> torch.Tensor:
    """The same of transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids + forced])).logits[0, len(ids) - 1 : -1].log_softmax(-1)


IDS = [1, 8, 84, 85, 12, 66, 67, 2, 1, 9, *range(30, 100)]
FORCED = [50, 51, 52, 53]


@llama_cpp
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen2", {"rope_parameters": YARN}),
        ("qwen3", {}),
        ("deepseek_v3", {}),
        ("deepseek_v3", {"q_lora_rank": None, "num_hidden_layers": 27, "n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    ],
)  # fmt: skip
def test_llama_cpp_computes_what_the_model_computes(family, sizes, tmp_path):
    from kitae.models.toy import make_model

    folder = make_model(tmp_path / "model", family, **LOUD, **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # biases begin at zero, where nothing would tell them apart
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    write_gguf(str(folder), How(output=tmp_path / "m.gguf"), kind="f32")
    wanted = expected(folder, IDS, FORCED)
    said = answers(tmp_path / "m.gguf", IDS, FORCED, size=wanted.shape[1])
    assert wanted.std(1).min() > 0.5
    torch.testing.assert_close(said["logprobs"], wanted, rtol=0, atol=2e-4)
    assert said["stops"] == {"2": True, "5": False}
    assert said["tokens"] == [[84, 85, 12, 3, 12, 29, 23, 30]]
    assert said["rendered"] == ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"]
    greedy = model.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=False)[0, len(IDS) :]
    assert said["greedy"][0]["ids"] == greedy.tolist()


# llama.cpp knows DeepSeek models without q_lora_rank by their 27 layers.
@llama_cpp
def test_qwen3_moe_and_deepseek_v2_run_in_llama_cpp(tmp_path):
    import transformers

    from kitae.models.toy import make_tokenizer

    tokenizer = make_tokenizer()
    common = {
        "vocab_size": 112, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.15, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }  # fmt: skip
    latent = {
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    for config in (
        transformers.Qwen3MoeConfig(
            **common, num_experts=8, head_dim=16, num_key_value_heads=2, norm_topk_prob=True
        ),
        transformers.DeepseekV2Config(
            **{**common, "num_hidden_layers": 27},
            **latent,
            n_routed_experts=8,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            routed_scaling_factor=1.0,
            norm_topk_prob=False,
        ),
    ):  # fmt: skip
        folder = tmp_path / config.model_type
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        path = tmp_path / f"{config.model_type}.gguf"
        write_gguf(str(folder), How(output=path), kind="f32")
        wanted = expected(folder, IDS, FORCED)
        said = answers(path, IDS, FORCED, size=wanted.shape[1])
        torch.testing.assert_close(said["logprobs"], wanted, rtol=0, atol=2e-4)


@llama_cpp
@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("bf16", 1e-3),
        ("f16", 1e-4),
        ("q8_0", 0.01),
        ("q6_k", 0.02),
        ("q5_k_m", 0.15),
        ("q4_k_m", 0.2),
        ("q4_0", 0.4),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "deepseek_v3"])
def test_every_type_stays_near_the_model(family, kind, limit, tiny, tmp_path):
    sizes = WIDE | ({} if family != "deepseek_v3" else {"moe_intermediate_size": 256})
    folder = tiny(family, initializer_range=0.05, **sizes)
    report = write_gguf(str(folder), How(output=tmp_path / "m.gguf"), kind=kind)
    assert report["bytes"] == (tmp_path / "m.gguf").stat().st_size
    wanted = expected(folder, IDS, FORCED)
    found = answers(tmp_path / "m.gguf", IDS, FORCED, size=wanted.shape[1])["logprobs"]
    kl = (wanted.exp() * (wanted - found)).sum(1).mean()
    assert 0 <= kl < limit


@llama_cpp
def test_an_adapter_is_merged_as_it_is_written_or_written_alone(tiny, tmp_path):
    from tests.export.test_merge import kitae_adapter

    for family in ("llama", "qwen3"):
        base = tiny(family)
        adapter = kitae_adapter(base, tmp_path / f"{family}-adapter")
        package.export("merge", adapter, tmp_path / f"{family}-merged", no_verify=True)
        wanted = expected(tmp_path / f"{family}-merged", IDS, FORCED)
        paths = {name: tmp_path / f"{family}-{name}.gguf" for name in ("whole", "base", "lora")}
        package.export("gguf", adapter, paths["whole"], type="F32", no_verify=True)
        package.export("gguf", base, paths["base"], type="F32", no_verify=True)
        report = package.export("gguf", adapter, paths["lora"], type="F32", adapter_only=True)
        assert report["verify"]["passed"]
        whole = answers(paths["whole"], IDS, FORCED, size=wanted.shape[1])["logprobs"]
        alone = answers(paths["base"], IDS, FORCED, size=wanted.shape[1], lora=paths["lora"])["logprobs"]
        assert (wanted - expected(base, IDS, FORCED)).abs().max() > 0.01
        torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(alone, wanted, rtol=0, atol=1e-4)


@llama_cpp
def test_the_system_prompt_of_training_is_in_the_template(tiny, tmp_path):
    from kitae.config import DataSettings, ModelSettings
    from kitae.data.chat import Template
    from kitae.models.load import load_tokenizer

    folder = tmp_path / "model"
    said = 'Say "yes"\nor no. \u00c9crivez peu \U0001f642 {% raw %} \\n'
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3"))
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(tiny("qwen3"))))
    template = Template.load(tokenizer, data=DataSettings(system_prompt=said))
    template.save(folder)
    write_gguf(str(folder), How(output=tmp_path / "m.gguf"), kind="f16")
    found = answers(tmp_path / "m.gguf", IDS, FORCED, size=112)
    wanted = f"<|im_start|>system\n{said}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert found["rendered"] == [wanted]


TURNS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3_DATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "1 Jan" %}{%- endif %}'
    "{%- endif %}{{- 'Today: ' + date_string + '\\n' }}"
)
MINIMIND_SWITCH = (
    "{%- if add_generation_prompt %}{%- if open_thinking is defined and open_thinking is true %}{{- '<think>\\n' }}"
    "{%- else %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


@llama_cpp
@pytest.mark.parametrize(
    ("jinja", "begin", "end"),
    [
        (LLAMA3_DATE + TURNS, "Today: 26 Jul 2024\n", "assistant\n"),
        (TURNS + MINIMIND_SWITCH, "", "<think>\n"),
    ],
    ids=["today", "thinking"],
)
def test_todays_date_and_the_switch_for_thinking_are_those_of_training(jinja, begin, end, tiny, tmp_path):
    folder = shutil.copytree(tiny("qwen3"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(jinja)
    report = package.export("gguf", folder, tmp_path / "m.gguf", type="f16")
    assert report["verify"]["passed"]
    [rendered] = answers(tmp_path / "m.gguf", IDS, FORCED, size=112)["rendered"]
    assert rendered.startswith(f"{begin}<|im_start|>user\nhi<|im_end|>") and rendered.endswith(end)


def test_what_is_read_back_is_what_was_written(tiny, tmp_path):
    from tests.export.conftest import tensors_of

    for family in ("llama", "deepseek_v3"):
        folder = tiny(family)
        path = tmp_path / f"{family}.gguf"
        write_gguf(str(folder), How(output=path), kind="f32")
        out = tmp_path / family
        out.mkdir()
        write_back(open_gguf(path), open_source(str(folder)), out)
        before, after = tensors_of(folder), tensors_of(out)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_stopped_export_goes_on_and_leaves_nothing_under_the_name(tiny, tmp_path, monkeypatch):
    folder, output = tiny("llama"), tmp_path / "m.gguf"
    monkeypatch.setattr(
        writer.gguf_file, "publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        write_gguf(str(folder), How(output=output), kind="q8_0")
    assert not output.exists() and (tmp_path / "m.gguf.partial").is_dir()
    monkeypatch.undo()
    write_gguf(str(folder), How(output=output), kind="q8_0")
    first = output.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    with pytest.raises(RunDirError, match="is there already"):
        write_gguf(str(folder), How(output=output), kind="q4_0")
    write_gguf(str(folder), How(output=output, overwrite=True), kind="q8_0")
    assert output.read_bytes() == first


def test_types_are_found_in_any_case_and_others_are_refused():
    assert [find_type(name) for name in ("q4_k_m", "Q4_K_M", "bf16", "iq4_xs")] == [
        "Q4_K_M",
        "Q4_K_M",
        "BF16",
        "IQ4_XS",
    ]
    with pytest.raises(ConfigError, match="no GGUF type 'q4km'; did you mean 'Q4_K_M'"):
        find_type("q4km")
    assert [i for i in range(28) if _gets_more_bits(i, 28)] == [
        0,
        1,
        2,
        5,
        8,
        11,
        14,
        17,
        20,
        23,
        24,
        25,
        26,
        27,
    ]
    assert default_output("org/Name", "Q8_0") == Path("Name-GGUF/Name-Q8_0.gguf")


def test_rows_that_do_not_fit_are_listed_and_an_unknown_model_is_refused(tiny, tmp_path):
    report = write_gguf(str(tiny("qwen3")), How(output=tmp_path / "m.gguf"), kind="q4_k_m")
    assert "blk.0.ffn_up.weight (Q4_K to Q5_0)" in report["fallbacks"]
    assert open_gguf(tmp_path / "m.gguf").kind("token_embd.weight") == "Q8_0"
    config = json.loads((tiny("qwen3") / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny("qwen3").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt_oss"}))
    with pytest.raises(ModelError, match="no GGUF of model_type 'gpt_oss'"):
        write_gguf(str(other), How(output=tmp_path / "o.gguf"), kind="f16")
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(ModelError, match="hidden_act 'gelu'"):
        write_gguf(str(other), How(output=tmp_path / "o.gguf"), kind="f16")
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    for rope, said in [
        (llama3, "llama.cpp computes qwen3 without it"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "turns whole heads"),
    ]:
        (other / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
        with pytest.raises(ModelError, match=said):
            write_gguf(str(other), How(output=tmp_path / "o.gguf"), kind="f16")
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="llama-quantize is not on the PATH")
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"num_hidden_layers": 28}),
        ("deepseek_v3", {"num_hidden_layers": 12, "n_routed_experts": 16}),
    ],
)
def test_mixes_are_those_of_llama_quantize(family, sizes, tiny, tmp_path):
    folder = tiny(family, **WIDE, **sizes)
    write_gguf(str(folder), How(output=tmp_path / "f32.gguf"), kind="f32")
    for kind in ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "Q5_0", "Q4_0"):
        own, theirs = tmp_path / f"{kind}.gguf", tmp_path / f"{kind}-theirs.gguf"
        write_gguf(str(folder), How(output=own), kind=kind)
        command = ["llama-quantize", str(tmp_path / "f32.gguf"), str(theirs), kind]
        subprocess.run(command, check=True, capture_output=True)
        a, b = open_gguf(own), open_gguf(theirs)
        assert {name: a.kind(name) for name in a.tensors} == {name: b.kind(name) for name in b.tensors}


def test_other_types_go_through_llama_quantize(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = ["export", "gguf", str(tiny("llama")), "--type", "q3_k_m", "--output", str(tmp_path / "m.gguf")]
    assert main(asked) == 2
    assert "llama-quantize, which is not on the PATH" in capsys.readouterr().err
    tool = tmp_path / "llama-quantize"
    tool.write_text('#!/bin/sh\necho "$3" >&2\n/bin/cp "$1" "$2"\n')
    tool.chmod(0o755)
    assert main([*asked, "--no_verify"]) == 0
    assert open_gguf(tmp_path / "m.gguf").kind("output.weight") == "BF16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-quantize", "m.gguf"]
    tool.write_text('#!/bin/sh\necho "no such type" >&2\nexit 1\n')
    assert main([*asked, "--overwrite", "--no_verify"]) == 2
    assert "failed (1): no such type" in capsys.readouterr().err
