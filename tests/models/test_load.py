"""What may be loaded, and how everything else is refused."""

from __future__ import annotations

import json
import logging
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from kitae import backends
from kitae.config import ModelSettings
from kitae.errors import ConfigError, ModelError, PlanError
from kitae.models import files
from kitae.models.load import load_policy, load_tokenizer
from kitae.models.toy import make_model


def settings_of(folder, **values) -> ModelSettings:
    return ModelSettings(name_or_path=str(folder), device="cpu", **values)


def rewrite(file, **changes) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


@pytest.fixture
def folder(tmp_path):
    """A model folder of its own, to be damaged."""
    return make_model(tmp_path / "model", "qwen3", num_hidden_layers=1)


def test_a_tokenizer_keeps_what_transformers_auto_class_would_drop(tiny):
    tokenizer = load_tokenizer(settings_of(tiny("qwen2")))
    text = "a\n b  <think>\n1</think><|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["DeepSeek-R1-Distill-Qwen", "DeepSeek-V3-R1", "minimind"])
def test_a_real_tokenizer_gives_exactly_what_its_file_says(name, shared_data, tmp_path):
    from tokenizers import Tokenizer

    source = shared_data / "tokenizers" / name
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    kind = {"DeepSeek-R1-Distill-Qwen": "qwen2", "DeepSeek-V3-R1": "deepseek_v3", "minimind": "llama"}[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 200_000}))
    found = load_tokenizer(settings_of(tmp_path))
    truth = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert len(found) == truth.get_vocab_size(with_added_tokens=True)
    for text in ("Hello,  world!\n\n12345 + 6", "今日は良い天気", "<think>\n√2 ≠ 1.4\n</think>\t'll we'd"):
        ids = truth.encode(text, add_special_tokens=False).ids
        assert found.encode(text, add_special_tokens=False) == ids
        assert found.decode(ids) == truth.decode(ids, skip_special_tokens=False)


def test_published_qwen2_vectors_come_out_of_the_distillations_tokenizer(shared_data):
    vectors = shared_data / "tokenizers" / "vectors"
    texts = (vectors / "ggml-vocab-qwen2.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")[:-1]
    rows = (vectors / "ggml-vocab-qwen2.gguf.out").read_text().splitlines()
    tokenizer = load_tokenizer_at(shared_data / "tokenizers" / "DeepSeek-R1-Distill-Qwen")
    checked = 0
    for text, row in zip(texts, rows, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == [int(n) for n in row.split()], repr(text)
        checked += 1
    assert checked > 40


def load_tokenizer_at(folder):
    """A tokenizer folder without a model, as model.tokenizer names it."""
    return load_tokenizer(ModelSettings(name_or_path="unused", tokenizer=str(folder)))


def test_dtype_and_device_are_explained_in_one_line(folder, caplog):
    caplog.set_level(logging.INFO, logger="kitae")
    policy = load_policy(ModelSettings(name_or_path=str(folder)))
    lines = [r.message for r in caplog.records if r.message.startswith("dtype")]
    assert len(lines) == 1
    assert lines[0].startswith(f"dtype {str(policy.dtype).removeprefix('torch.')} (")
    assert f"device {policy.device} (model.device is auto)" in lines[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_asked_precision_is_what_weights_have(dtype, folder):
    policy = load_policy(settings_of(folder, dtype=dtype))
    assert policy.dtype == getattr(torch, dtype)
    assert {p.dtype for p in policy.parameters()} == {policy.dtype}


def test_a_run_directory_is_a_model_and_an_unfinished_one_says_so(folder, tmp_path):
    rewrite_run = folder / "run.json"
    rewrite_run.write_text("{}")
    assert load_policy(settings_of(folder)).named_trainable()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text("{}")
    with pytest.raises(ModelError, match="no final model yet"):
        load_policy(settings_of(tmp_path / "unfinished"))


def test_a_model_that_is_nowhere_is_one_clear_line(tmp_path):
    with pytest.raises(ModelError, match="no such folder: /no/where/at/all"):
        load_policy(settings_of("/no/where/at/all"))
    with pytest.raises(
        ModelError, match=r"someone/some-model is no folder here, and it cannot be downloaded"
    ):
        load_policy(settings_of("someone/some-model"))
    with pytest.raises(ModelError, match=r"neither config\.json nor adapter_config\.json"):
        load_policy(settings_of(tmp_path))


def test_a_downloaded_hub_model_is_found_in_the_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--toy" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (cache / "models--someone--toy" / "refs").mkdir()
    (cache / "models--someone--toy" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    policy = load_policy(settings_of("someone/toy"))
    assert policy.base_name == "someone/toy"


def test_pickled_weights_are_refused_with_a_hint(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle"):
        load_policy(settings_of(folder))


def test_a_config_cannot_name_code_to_run(folder):
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    rewrite(
        folder / "config.json",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        trust_remote_code=True,
        _attn_implementation_internal="someone/kernel",
        _experts_implementation="evil",
    )
    config = files.read_config(folder)
    assert not any(key.startswith("_") or key in ("auto_map", "trust_remote_code") for key in config)
    policy = load_policy(settings_of(folder))
    assert policy.config._attn_implementation in ("kitae", "kitae_kernels")
    assert not marker.exists()


def test_code_of_a_model_runs_only_where_it_is_trusted(folder, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "own.py").write_text(
        "from transformers import Qwen3ForCausalLM\nclass Own(Qwen3ForCausalLM):\n    is_own = True\n"
    )
    rewrite(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    assert not hasattr(load_policy(settings_of(folder)).causal_lm, "is_own")
    trusted = load_policy(settings_of(folder, trust_remote_code=True))
    assert trusted.causal_lm.is_own


def test_nested_configs_are_cleaned_too(folder):
    rewrite(
        folder / "config.json", text_config={"auto_map": {}, "list": [{"trust_remote_code": True, "a": 1}]}
    )
    assert files.read_config(folder)["text_config"] == {"list": [{"a": 1}]}


def test_infinite_numbers_of_a_config_are_read_as_transformers_writes_them(folder):
    rewrite(folder / "config.json", limits=[0.0, {"__float__": "Infinity"}])
    assert files.read_config(folder)["limits"] == [0.0, float("inf")]


def test_a_config_of_a_wrong_type_names_file_and_field(folder):
    rewrite(folder / "config.json", hidden_size="many")
    with pytest.raises(ModelError, match=r"config\.json is not a valid qwen3 configuration: .*hidden_size"):
        load_policy(settings_of(folder))


def test_an_unknown_architecture_names_the_nearest(folder):
    rewrite(folder / "config.json", model_type="qwen33")
    with pytest.raises(ModelError, match=r"model_type 'qwen33'.*did you mean 'qwen3'"):
        load_policy(settings_of(folder))
    rewrite(folder / "config.json", model_type=None)
    with pytest.raises(ModelError, match="no model_type"):
        load_policy(settings_of(folder))


def test_damaged_json_names_the_file(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        load_policy(settings_of(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds a list where a JSON object belongs"):
        load_policy(settings_of(folder))


def test_weights_that_do_not_fit_the_config_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        {k: v for k, v in weights.items() if k != name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"1 weights are missing .*up_proj"):
        load_policy(settings_of(folder))
    save_file({**weights, name: torch.zeros(3, 3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"cannot be loaded|another shape"):
        load_policy(settings_of(folder))


def header_file(path, entries, *, data=b"", length=None):
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize(
    ("entries", "data", "length", "message"),
    [
        ({}, b"", 2**40, "not a whole safetensors file"),
        ({}, b"", 20 << 20, "not a whole safetensors file"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", None, "download it again"),
        (
            {"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}},
            b"12345678",
            None,
            "is said to be F32",
        ),
        (
            {"x": {"dtype": "F32", "shape": [0, 99999999999999], "data_offsets": [0, 0]}},
            b"",
            None,
            "impossible shape",
        ),
        (
            {"x": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
            b"12345678",
            None,
            "is said to be",
        ),
        (
            {"x": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
            b"12345678",
            None,
            "is said to be F99",
        ),
        ({"x": {"dtype": "F32"}}, b"", None, "damaged safetensors header"),
        ([], b"", None, "damaged safetensors header"),
    ],
)
def test_a_hostile_safetensors_header_is_refused_before_anything_is_allocated(
    entries, data, length, message, tmp_path
):
    header_file(tmp_path / "x.safetensors", entries, data=data, length=length)
    with pytest.raises(ModelError, match=message):
        files.header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("shard", ["../../etc/passwd", "/etc/passwd", "sub/x.safetensors", "weights.bin", 7])
def test_an_index_cannot_point_outside_the_folder(shard, folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ModelError, match=r"not plain \.safetensors file names"):
        load_policy(settings_of(folder))


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "gone.safetensors"}})
    )
    with pytest.raises(ModelError, match=r"gone\.safetensors is missing"):
        load_policy(settings_of(folder))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder):
    rewrite(folder / "config.json", vocab_size=16)
    with pytest.raises(ModelError, match="they do not belong together"):
        load_tokenizer(settings_of(folder))


def test_a_missing_or_damaged_tokenizer_says_what_to_do(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(settings_of(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json; name another with model\.tokenizer"):
        load_tokenizer(settings_of(folder))


def test_an_adapter_on_an_adapter_or_on_nothing_is_refused(tmp_path):
    for name, base in (("a", None), ("b", str(tmp_path / "a")), ("c", str(tmp_path / "b"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "b" / "adapter_config.json").write_text('{"base_model_name_or_path": "../moved/away"}')
    said = (
        r"the base of .*no such folder: ../moved/away \(set: base_model_name_or_path in .*adapter_config.json"
    )
    with pytest.raises(ModelError, match=said):
        load_policy(settings_of(tmp_path / "b"))
    with pytest.raises(ModelError, match="names no base_model_name_or_path"):
        load_policy(settings_of(tmp_path / "a"))


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigError, match=r"model\.device 'gpu' is unknown"):
        backends.pick("gpu")


def test_a_model_larger_than_memory_is_refused_before_weights_are_read(folder, monkeypatch):
    from kitae.backends.cpu import BACKEND

    monkeypatch.setattr(type(BACKEND), "memory", lambda self, device: (500_000, 500_000))
    (folder / "model.safetensors").touch()
    with pytest.raises(
        PlanError, match=r"44,256 parameters: weights .* 0\.5 MiB are free; lora\.rank = 16 needs"
    ):
        load_policy(settings_of(folder))


def test_torch_compile_compiles_every_layer_in_place(folder):
    policy = load_policy(settings_of(folder, torch_compile=True))
    assert all(layer._compiled_call_impl is not None for layer in policy.causal_lm.model.layers)
    assert all("_orig_mod" not in name for name, _ in policy.named_trainable())
