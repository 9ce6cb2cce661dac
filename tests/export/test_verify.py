"""The gate: what is right passes it, and every fault that exports are known for is caught."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kitae as package
from kitae import backends
from kitae.cli._gate import text_of
from kitae.cli.main import main
from kitae.errors import GateError, PlanError
from kitae.export import gguf_file, verify_answers, verify_llama
from kitae.export import verify as gate
from kitae.export.convert import How
from kitae.export.gguf import write_gguf
from kitae.export.verify import compare, verify
from tests.export.test_merge import kitae_adapter

gguf = pytest.importorskip("gguf")


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def file(model, tmp_path):
    """A good file of q8_0."""
    path = tmp_path / "m.gguf"
    write_gguf(str(model), How(output=path), kind="q8_0")
    return path


def edited(file):
    """A file whose bytes can be changed through the gguf package."""
    return gguf.GGUFReader(file, "r+")


def row(report, name):
    return next(r for r in report["rows"] if r["name"] == name)


def failures(reference, candidate) -> str:
    report = verify(str(reference), [candidate])
    assert not report["passed"]
    return "; ".join(row(report, candidate.name)["failures"])


def test_all_forms_of_a_model_are_compared_in_one_table(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter = kitae_adapter(tiny("llama"), tmp_path / "adapter")
    for command in (
        ["merge", "adapter", "--output", "merged"],
        ["bf16-to-fp8", "merged", "--output", "fp8"],
        ["gguf", "adapter", "--type", "Q8_0"],
    ):
        assert main(["export", *command]) == 0
    assert json.loads((tmp_path / "merged" / "kitae_verify.json").read_text())["passed"]
    made = tmp_path / "adapter-GGUF" / "adapter-Q8_0.gguf"
    assert json.loads(made.with_name(f"{made.name}.verify.json").read_text())["passed"]
    capsys.readouterr()
    assert main(["export", "verify", "adapter", "merged", "fp8", str(made), "--json", "found.json"]) == 0
    assert "6 prompts" in capsys.readouterr().out
    report = json.loads((tmp_path / "found.json").read_text())
    assert [r["name"] for r in report["rows"]] == ["base", "base+adapter", "merged", "fp8", made.name]
    base, _, merged, fp8, file = report["rows"]
    assert merged["kl_mean"] < 1e-6 < base["kl_mean"] and merged["same_text"] == 1
    assert fp8["kind"] == "F8_E4M3" and file["kind"] == "Q8_0"
    assert merged["tensors"]["adapter_share"] == pytest.approx(1, abs=0.01)
    assert file["tensors"]["adapter_share"] == pytest.approx(1, abs=0.2)
    assert adapter.is_dir() and file["stops"] == [2]


def test_a_report_says_what_ran_the_file(model, file, monkeypatch):
    wanted = "llama.cpp" if verify_llama.has_llama_cpp() else "dequantised by gguf, kitae, float32"
    assert verify(str(model), [file])["rows"][-1]["how"] == wanted
    monkeypatch.setattr(gate, "has_llama_cpp", lambda: False)
    report = verify(str(model), [file])
    assert report["passed"] and report["rows"][-1]["how"] == "dequantised by gguf, kitae, float32"
    assert 0 < report["rows"][-1]["kl_mean"] < 1e-4


def test_swapped_tensors_are_caught(model, file, tmp_path):
    reader = edited(file)
    found = {t.name: t.data for t in reader.tensors}
    one, other = found["blk.0.attn_k.weight"], found["blk.1.attn_k.weight"]
    one[:], other[:] = other.copy(), one.copy()
    reader.data.flush()
    assert "blk.0.attn_k.weight (Q8_0) is off by" in failures(model, file)

    folder = shutil.copytree(model, tmp_path / "swapped")
    tensors = load_file(folder / "model.safetensors")
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save_file(tensors, folder / "model.safetensors")
    assert f"{names[0]} (F32) is off by" in failures(model, folder)


def test_a_zeroed_or_wrong_scale_is_caught(tiny, tmp_path):
    model = tiny("llama", hidden_size=256, intermediate_size=512)
    for name, factor in (("zeroed", 0.0), ("doubled", 2.0)):
        folder = tmp_path / name
        package.export("bf16-to-fp8", model, folder)
        tensors = load_file(folder / "model.safetensors")
        scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
        tensors[scale][1, 1] *= factor
        save_file(tensors, folder / "model.safetensors")
        said = failures(model, folder)
        assert "model.layers.1.mlp.up_proj.weight (F8_E4M3) is off by" in said and "in a block" in said
        assert ("1 of 8 scales are 0 over numbers that are not" in said) == (factor == 0)


def test_another_eos_is_caught(model, file, tmp_path):
    reader = edited(file)
    field = reader.fields["tokenizer.ggml.eos_token_id"]
    field.parts[field.data[0]][0] = 40
    reader.data.flush()
    said = failures(model, file)
    assert "tokenizer.ggml.eos_token_id is 40, not 2" in said

    folder = shutil.copytree(model, tmp_path / "eos")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|pad|>"}))
    assert "its chat template, system prompt or stop ids are others" in failures(model, folder)

    folder = shutil.copytree(model, tmp_path / "other-eos")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 40}))
    assert "end completions at ids [40], not [2]" in failures(model, folder)


def test_another_template_is_caught(model, file, tmp_path):
    reader = edited(file)
    field = reader.fields["tokenizer.chat_template"]
    text = bytes(field.parts[field.data[0]])
    field.parts[field.data[0]][:] = np.frombuffer(text.replace(b"assistant\\n", b"ASSISTANT\\n"), np.uint8)
    reader.data.flush()
    said = failures(model, file)
    assert 'tokenizer.chat_template is "...ASSISTANT' in said and ', not "...assistant' in said
    assert ("rendered otherwise by llama.cpp" in said) == verify_llama.has_llama_cpp()

    folder = shutil.copytree(model, tmp_path / "template")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>\\n", "<|im_end|>"))
    said = failures(model, folder)
    assert "its chat template" in said and "6 of 6 prompts become other token ids" in said


def test_a_merged_model_that_equals_its_base_is_caught(model, tmp_path):
    adapter = kitae_adapter(model, tmp_path / "adapter")
    same = shutil.copytree(model, tmp_path / "same")
    assert "only 0% of the adapter's change is in it: it equals the base" in failures(adapter, same)
    write_gguf(str(model), How(output=tmp_path / "m.gguf"), kind="bf16")
    assert "it equals the base" in failures(adapter, tmp_path / "m.gguf")


def test_another_vocabulary_another_size_and_a_cut_file_are_caught(model, file, tmp_path):
    reader = edited(file)
    field = reader.fields["tokenizer.ggml.tokens"]
    field.parts[field.data[40]][0], field.parts[field.data[41]][0] = (
        field.parts[field.data[41]][0].copy(),
        field.parts[field.data[40]][0].copy(),
    )
    reader.data.flush()
    assert "tokenizer.ggml.tokens is" in failures(model, file)
    file.write_bytes(file.read_bytes()[:-5000])
    assert "no whole GGUF file" in failures(model, file)
    folder = shutil.copytree(model, tmp_path / "less")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight is missing" in failures(model, folder)


def test_a_rejected_export_loses_its_name_and_exits_with_3(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real = gguf_file.blocks.quantize
    monkeypatch.setattr(gguf_file.blocks, "quantize", lambda kind, x: real(kind, -x))
    command = ["export", "gguf", str(model), "--type", "q4_0", "--output", "m.gguf"]
    for _ in range(2):
        assert main(command) == 3
        said = capsys.readouterr().err
        assert "m.gguf failed the gate:" in said and "FAILED m.gguf: token_embd" in said
        assert not (tmp_path / "m.gguf").exists() and (tmp_path / "m.gguf.rejected").is_file()
    assert not json.loads((tmp_path / "m.gguf.rejected.verify.json").read_text())["passed"]
    assert main([*command, "--no_verify"]) == 0
    assert main(["export", "verify", str(model), "m.gguf"]) == 3 and (tmp_path / "m.gguf").is_file()
    with pytest.raises(GateError, match="failed the gate"):
        package.export("verify", model, candidates=["m.gguf"])


def test_a_report_is_not_carried_to_another_export(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "source")
    (folder / "kitae_verify.json").write_text('{"passed": true}')
    command = ["export", "bf16-to-fp8", str(folder), "--output", str(tmp_path / "fp8"), "--no_verify"]
    assert main(command) == 0 and not (tmp_path / "fp8" / "kitae_verify.json").exists()


def test_what_cannot_be_run_is_compared_by_its_tensors_and_says_so(model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "bare")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert main(["export", "bf16-to-fp8", str(folder), "--output", str(tmp_path / "fp8")]) == 0
    said = capsys.readouterr().out
    assert "the original was not run: " in said and "no tokenizer.json" in said
    assert "not checked of fp8: log-probabilities and completions against the original's" in said
    report = json.loads((tmp_path / "fp8" / "kitae_verify.json").read_text())
    assert [r["how"] for r in report["rows"]] == ["tensors only"] and report["rows"][0]["tensors"][
        "count"
    ] == 21


def without_room(monkeypatch):
    """As if the model did not fit into memory."""

    def load_policy(*_, **__):
        raise PlanError("the model needs more memory than there is")

    monkeypatch.setattr(verify_answers, "load_policy", load_policy)


def test_what_this_machine_cannot_run_is_an_error_and_no_failure_of_the_export(model, monkeypatch):
    def no_room(*_, **__):
        raise PlanError("it needs more memory than there is")

    monkeypatch.setattr("kitae.export.verify.answers_of_folder", no_room)
    with pytest.raises(PlanError, match="more memory than there is"):
        verify(str(model), [model])


@pytest.mark.parametrize("is_large", [False, True])
def test_a_file_whose_original_does_not_fit_into_memory_still_runs_in_llama_cpp(
    is_large, model, file, monkeypatch
):
    pytest.importorskip("xllamacpp")
    without_room(monkeypatch)
    if is_large:  # the file too
        monkeypatch.setattr(type(backends.pick("cpu")), "memory", lambda *_: (1000, 1000))
    report = verify(str(model), [file])
    [found] = report["rows"]
    assert report["passed"] and report["not_run"] == "the model needs more memory than there is"
    assert (found["how"], found["stops"]) == ("llama.cpp, alone", [2])
    assert found["tensors"]["count"] == 21 and found["kl_mean"] is None
    assert found["not_checked"] == ["log-probabilities and completions against the original's"]
    assert "not checked of m.gguf: log-probabilities" in text_of(report)


def test_faults_are_caught_where_the_original_does_not_fit_into_memory(model, file, monkeypatch):
    pytest.importorskip("xllamacpp")
    without_room(monkeypatch)
    reader = edited(file)
    field = reader.fields["tokenizer.chat_template"]
    text = bytes(field.parts[field.data[0]])
    field.parts[field.data[0]][:] = np.frombuffer(text.replace(b"assistant\\n", b"ASSISTANT\\n"), np.uint8)
    field = reader.fields["tokenizer.ggml.eos_token_id"]
    field.parts[field.data[0]][0] = 40
    norm = next(t for t in reader.tensors if t.name == "output_norm.weight")
    norm.data[:] = np.nan
    reader.data.flush()
    said = failures(model, file)
    assert "6 of 6 conversations are rendered otherwise by llama.cpp" in said
    assert "it does not stop at ids [2]" in said
    assert "after 6 of 6 prompts its log-probabilities are not finite" in said


def test_an_adapters_own_file_is_verified_by_name(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kitae_adapter(model, tmp_path / "adapter")
    assert main(["export", "gguf", "adapter", "--adapter_only", "--output", "a.gguf", "--no_verify"]) == 0
    assert main(["export", "merge", "adapter", "--output", "merged", "--no_verify"]) == 0
    capsys.readouterr()
    assert main(["export", "verify", "adapter", "a.gguf"]) == 0
    said = capsys.readouterr().out
    assert "tensors only" in said and "not checked of a.gguf: what it says on its base in llama.cpp" in said
    report = verify("adapter", ["merged", "a.gguf"])
    assert report["passed"] and row(report, "merged")["kl_mean"] < 1e-6
    assert row(report, "a.gguf")["tensors"]["count"] == 14
    assert "a.gguf holds an adapter alone" in failures(model, tmp_path / "a.gguf")

    reader = edited(tmp_path / "a.gguf")
    half = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight.lora_b")
    half.data[:] *= -1
    reader.data.flush()
    assert main(["export", "verify", "adapter", "a.gguf"]) == 3
    assert "FAILED a.gguf: blk.1.ffn_up.weight (F16) is off by 2" in capsys.readouterr().out


def test_a_model_in_4_bits_is_compared_too(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = tiny("llama")
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    folder = tmp_path / "nf4"
    AutoModelForCausalLM.from_pretrained(model, quantization_config=how, device_map="cpu").save_pretrained(
        folder
    )
    for path in (*model.glob("tokenizer*"), *model.glob("*.jinja")):
        shutil.copy(path, folder / path.name)
    report = verify(str(model), [folder])
    found = row(report, "nf4")
    assert report["passed"] and found["kind"] == "packed" and 1e-6 < found["kl_mean"] < 0.1
    assert 0.05 < found["tensors"]["worst_error"] < 0.15


def test_distances_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(3, 400, generator=generator).log_softmax(1)
    q = torch.randn(3, 400, generator=generator).log_softmax(1)
    difference, kl, same = compare(p, q)
    top = p.topk(256).indices
    torch.testing.assert_close(difference, (q - p).gather(1, top))
    rest = [1 - x.gather(1, top).exp().sum(1) for x in (p, q)]
    wanted = (p.exp() * (p - q)).gather(1, top).sum(1) + rest[0] * (rest[0] / rest[1]).log()
    torch.testing.assert_close(kl, wanted, rtol=1e-4, atol=1e-6)
    assert (kl <= (p.exp() * (p - q)).sum(1)).all()
    assert same.tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    small = p[:, :5].log_softmax(1)
    told = small.masked_fill(small < small.topk(3).values[:, -1:], -torch.inf)
    difference, _, _ = compare(small, told)
    assert difference.min() == 0 and (difference.max(1).values > 0).all()  # untold: at most the least told
