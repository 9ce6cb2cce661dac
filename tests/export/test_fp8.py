"""FP8 to BF16 and back: bit by bit against the definition, every tensor accounted for, and what is damaged refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import kitae as package
from kitae import backends
from kitae.errors import ConfigError, ModelError, RunDirError
from kitae.export import convert, fp8, weights
from kitae.export.convert import How, bf16_to_fp8, fp8_to_bf16
from kitae.models.files import header
from tests.export.conftest import (
    QUANTIZATION,
    random_fp8,
    slow_dequantize,
    slow_quantize,
    tensors_of,
    write_model,
)

SCALE = "_scale_inv"


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_bf16_is_the_definition_to_the_bit_with_scales_in_other_files(fp8_model, tmp_path):
    source = tensors_of(fp8_model)
    index = json.loads((fp8_model / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(file != index[n + SCALE] for n, file in index.items() if n + SCALE in index)
    report = fp8_to_bf16(str(fp8_model), How(output=tmp_path / "out", num_workers=2))
    found = tensors_of(tmp_path / "out")
    assert found.keys() == {name for name in source if not name.endswith(SCALE)}
    for name, tensor in found.items():
        if name + SCALE in source:
            assert same_bits(tensor, slow_dequantize(source[name], source[name + SCALE]).bfloat16()), name
        else:
            assert same_bits(tensor, source[name]), name
    assert (report["converted"], report["tensors"]) == (4, 8)


def test_pieces_of_any_size_give_the_same_bits(fp8_model, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "CHUNK", 1)
    fp8_to_bf16(str(fp8_model), How(output=tmp_path / "small", num_workers=1))
    monkeypatch.undo()
    fp8_to_bf16(str(fp8_model), How(output=tmp_path / "large", num_workers=3))
    for file in (tmp_path / "small").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "large" / file.name).read_bytes()


def test_config_index_and_all_other_files_come_along(fp8_model, tmp_path):
    out = tmp_path / "out"
    fp8_to_bf16(str(fp8_model), How(output=out))
    config = json.loads((out / "config.json").read_text())
    assert config == {"model_type": "deepseek_v3", "torch_dtype": "bfloat16"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_x.py"):
        assert (out / name).read_text() == f"this is {name}"
    assert not (tmp_path / "out.partial").exists() and not list(out.glob("*lock*"))


@pytest.mark.parametrize("size", [(128, 128), (256, 384), (1, 1), (129, 127), (300, 1000)])
def test_fp8_is_amax_over_448_by_block(size, tmp_path):
    generator = torch.Generator().manual_seed(sum(size))
    weight = torch.randn(size, generator=generator).bfloat16()
    weight[:, 128:256] = 0  # whole blocks of zeros, where there are so many columns
    name = "model.layers.0.mlp.up_proj.weight"
    folder = write_model(tmp_path / "in", {name: weight, "lm_head.weight": weight.clone()})
    bf16_to_fp8(str(folder), How(output=tmp_path / "out"))
    found = tensors_of(tmp_path / "out")
    expected, scale = slow_quantize(weight)
    assert same_bits(found[name], expected) and same_bits(found[name + SCALE], scale)
    assert size[1] < 256 or found[name + SCALE][0, 1] == 1
    assert same_bits(found["lm_head.weight"], weight)
    assert found.keys() == {name, name + SCALE, "lm_head.weight"}


def test_to_fp8_and_back_loses_no_more_than_fp8_rounds(tmp_path):
    weight = torch.randn(200, 300).bfloat16()
    name = "model.layers.3.self_attn.o_proj.weight"
    bf16_to_fp8(str(write_model(tmp_path / "in", {name: weight})), How(output=tmp_path / "fp8"))
    fp8_to_bf16(str(tmp_path / "fp8"), How(output=tmp_path / "back"))
    found = tensors_of(tmp_path / "back")[name].float()
    # e4m3 has 3 bits after the point, so half a step is 2^-4 of a number, or of the smallest normal one, 2^-6 x scale.
    bound = weight.float().abs() * 2**-4 * 1.01 + tensors_of(tmp_path / "fp8")[name + SCALE].max() * 2**-10
    assert ((found - weight.float()).abs() <= bound).all()


def test_numbers_below_float32s_normal_ones_stay_finite():
    x = torch.tensor([[1e-40, -3e-41], [7e-45, 0.0]])
    small, scale = fp8.quantize_rows(x, power_of_two=False)
    assert small.float().isfinite().all() and scale.isfinite().all() and (scale > 0).all()


def test_powers_of_two_are_written_only_if_asked_and_cover_the_largest(tmp_path):
    weight = torch.randn(256, 128).bfloat16()
    weight[128:] = 0
    weight[128, 0] = 448 * 2**-9  # amax / 448 is a power of two itself
    name = "model.layers.0.mlp.up_proj.weight"
    folder = write_model(tmp_path / "in", {name: weight})
    bf16_to_fp8(str(folder), How(output=tmp_path / "out"), scale_format="ue8m0")
    found = tensors_of(tmp_path / "out")
    scale = found[name + SCALE]
    assert scale.dtype == torch.float32 and (torch.frexp(scale)[0] == 0.5).all()
    assert scale[1, 0] == 2**-9
    amax = weight[:128].float().abs().max() / 448
    assert amax <= scale[0, 0] < 2 * amax
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {**QUANTIZATION, "scale_fmt": "ue8m0"}
    expected = (weight[:128].float() / scale[0, 0]).to(torch.float8_e4m3fn)
    assert same_bits(found[name][:128], expected)


def test_scales_of_one_byte_are_read(tmp_path):
    weight, _ = random_fp8(256, 128)
    scale = torch.tensor([[2.0**-7], [2.0**3]])
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {name: weight, name + SCALE: scale.to(torch.float8_e8m0fnu)}
    folder = write_model(tmp_path / "in", tensors, config={"quantization_config": QUANTIZATION})
    fp8_to_bf16(str(folder), How(output=tmp_path / "out"))
    assert same_bits(tensors_of(tmp_path / "out")[name], slow_dequantize(weight, scale).bfloat16())


def test_the_same_tensors_as_in_the_release_are_converted():
    layer = "model.layers.61."
    yes = [
        "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj",
        "self_attn.o_proj", "mlp.gate_proj", "mlp.experts.255.down_proj", "mlp.shared_experts.up_proj",
        "self_attn.indexer.wq_b",
    ]  # fmt: skip
    no = [
        "mlp.gate", "eh_proj", "shared_head.head", "embed_tokens", "self_attn.q_a_layernorm", "enorm",
        "self_attn.indexer.weights_proj",
    ]  # fmt: skip
    assert all(fp8.is_converted(f"{layer}{n}.weight", dims=2) for n in yes)
    assert not any(fp8.is_converted(f"{layer}{n}.weight", dims=2) for n in no)
    assert not fp8.is_converted("lm_head.weight", dims=2)
    assert not fp8.is_converted(f"{layer}mlp.experts.gate_up_proj", dims=3)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_what_is_written_loads_in_kitae_and_the_rest_is_named_for_others(family, tiny, tmp_path):
    from kitae.config import ModelSettings
    from kitae.models.load import load_policy

    folder = tiny(family)
    bf16_to_fp8(str(folder), How(output=tmp_path / "fp8"))
    fp8_to_bf16(str(tmp_path / "fp8"), How(output=tmp_path / "back"))
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert ("modules_to_not_convert" in config) == (family == "qwen3")
    states = []
    for name in ("fp8", "back"):
        settings = ModelSettings(name_or_path=str(tmp_path / name), device="cpu", dtype="bfloat16")
        states.append(load_policy(settings, trainable=False).causal_lm.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def rewritten(folder, change):
    """The model with one file's tensors changed, and its index as it was."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


Q = "model.layers.0.self_attn.q_a_proj.weight"


def drop(name):
    return lambda tensors: tensors.pop(name, None)


def put(name, index, value):
    def change(tensors):
        if name in tensors:
            tensors[name].view(-1)[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(Q + SCALE), "is in no shard"),
        (put(Q + SCALE, 0, float("nan")), f"{Q} has values that are NaN or infinite"),
        (put(Q + SCALE, 1, float("inf")), f"{Q} has values that are NaN or infinite"),
    ],
)
def test_damaged_scales_are_refused_by_name(change, message, fp8_model, tmp_path):
    with pytest.raises(ModelError, match=message.replace(".", r"\.")):
        fp8_to_bf16(str(rewritten(fp8_model, change)), How(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nan_in_an_fp8_weight_is_refused_by_name(fp8_model, tmp_path):
    def change(tensors):
        if Q in tensors:
            tensors[Q].view(torch.uint8).view(-1)[77] = 0x7F

    with pytest.raises(ModelError, match=r"q_a_proj\.weight has values that are NaN"):
        fp8_to_bf16(str(rewritten(fp8_model, change)), How(output=tmp_path / "out"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_and_infinities_are_not_quantized(value, tmp_path):
    weight = torch.randn(130, 130).bfloat16()
    weight[129, 129] = value
    folder = write_model(tmp_path / "in", {"model.layers.0.mlp.up_proj.weight": weight})
    with pytest.raises(ModelError, match=r"up_proj\.weight has values that are NaN or infinite"):
        bf16_to_fp8(str(folder), How(output=tmp_path / "out"))


def test_every_code_of_fp8_is_widened_as_torch_casts_it():
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    slow, fast = codes.float(), fp8.widen(codes)
    is_nan = slow.isnan()
    assert same_bits(fast[~is_nan], slow[~is_nan])  # -0 keeps its sign
    assert fast[is_nan].tolist() == [480.0, -480.0]


def test_a_sum_that_overflows_is_no_infinity():
    assert fp8.require_finite(torch.full((4,), 3e38), name="x").isfinite().all()


def test_missing_left_over_and_ill_shaped_scales_are_errors(tmp_path):
    weight, scale = random_fp8(256, 256)
    name = "model.layers.0.mlp.up_proj.weight"
    config = {"quantization_config": QUANTIZATION}
    cases = {
        "missing": ({name: weight}, "up_proj.weight_scale_inv is missing"),
        "over": (
            {name: weight, name + SCALE: scale, "x_scale_inv": scale.clone()},
            "x_scale_inv is left over: there is no",
        ),
        "plain": ({name: weight.bfloat16(), name + SCALE: scale}, "left over: that weight is BF16"),
        "shape": (
            {name: weight, name + SCALE: scale[:1].contiguous()},
            r"blocks of 128 x 128 .* need \[2, 2\]",
        ),
        "e5m2": ({name: weight.float().to(torch.float8_e5m2)}, "stored as F8_E5M2, which kitae cannot read"),
        "none": ({name: weight.bfloat16()}, "has no FP8 weights"),
    }
    for case, (tensors, message) in cases.items():
        folder = write_model(tmp_path / case, tensors, config=config)
        with pytest.raises(ModelError, match=message):
            fp8_to_bf16(str(folder), How(output=tmp_path / "out"))
    whole = write_model(tmp_path / "whole", {name: weight, name + SCALE: scale}, config=config)
    with pytest.raises(ModelError, match="is in FP8 already"):
        bf16_to_fp8(str(whole), How(output=tmp_path / "out"))
    other = write_model(tmp_path / "other", {"a.weight": weight.bfloat16()})
    with pytest.raises(ModelError, match="no linears of layers"):
        bf16_to_fp8(str(other), How(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_index_and_the_files_must_agree(fp8_model, tmp_path):
    def refused(match):
        with pytest.raises(ModelError, match=match):
            fp8_to_bf16(str(fp8_model), How(output=tmp_path / "out"))

    index = fp8_model / "model.safetensors.index.json"
    whole = index.read_text()
    mapping = json.loads(whole)
    mapping["weight_map"].pop("lm_head.weight")
    index.write_text(json.dumps(mapping))
    refused("lm_head.weight is in a shard but not in the index")
    index.write_text(whole)
    first, second, _ = sorted(fp8_model.glob("*.safetensors"))
    save_file({**load_file(second), **load_file(first)}, second)
    refused("is in model-00001-of-00003.safetensors and in model-00002")
    first.write_bytes(first.read_bytes()[:-3])
    refused("bytes long, its header says")


def test_tensors_are_aligned_whatever_their_sizes(fp8_model, tmp_path):
    fp8_to_bf16(str(fp8_model), How(output=tmp_path / "bf16"))
    bf16_to_fp8(str(tmp_path / "bf16"), How(output=tmp_path / "out"))
    for file in (tmp_path / "out").glob("*.safetensors"):
        sizes = [{"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype] for dtype, _ in header(file).values()]
        assert sizes == sorted(sizes, reverse=True)


def test_peak_memory_is_far_below_the_model(tmp_path):
    """128 MiB of weights in four files, in a process of its own that says how much it grew."""
    tensors = {}
    for i in range(8):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        tensors[name] = torch.zeros(4096, 4096, dtype=torch.float8_e4m3fn)
        tensors[name + SCALE] = torch.ones(32, 32)
    folder = write_model(tmp_path / "in", tensors, shards=4, config={"quantization_config": QUANTIZATION})
    code = (
        "import resource, sys; from pathlib import Path; from kitae.export.convert import How, fp8_to_bf16\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = peak()\n"
        "fp8_to_bf16(sys.argv[1], How(output=Path(sys.argv[2]), num_workers=2))\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 60, f"grew by {done.stdout} MiB"


def test_a_disk_too_small_is_told_before_anything_is_written(fp8_model, tmp_path, monkeypatch):
    monkeypatch.setattr("kitae.export.shards.free_bytes", lambda _: 1000)
    with pytest.raises(RunDirError, match=r"disk too small: need .* have 1000 bytes"):
        fp8_to_bf16(str(fp8_model), How(output=tmp_path / "out"))
    assert not list((tmp_path / "out.partial").glob("*.safetensors"))


def test_blocks_are_computed_where_it_is_said(fp8_model, tmp_path, monkeypatch):
    asked = []
    real = fp8.dequantize_rows

    def dequantize_rows(weight, scale, **options):
        asked.append({weight.device.type, scale.device.type})
        return real(weight, scale, **options)

    monkeypatch.setattr(weights, "dequantize_rows", dequantize_rows)
    package.export("fp8-to-bf16", fp8_model, tmp_path / "a", device="cpu", no_verify=True)
    assert asked and all(kinds == {"cpu"} for kinds in asked)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device is 'cuda', but this machine has no cuda device"):
            package.export("fp8-to-bf16", fp8_model, tmp_path / "b", device="cuda")
        package.export("fp8-to-bf16", fp8_model, tmp_path / "b", no_verify=True)
        assert all(kinds == {"cpu"} for kinds in asked)
        # A device that has no numbers is asked for them.
        with pytest.raises(RuntimeError, match="meta tensor"):
            fp8_to_bf16(
                str(fp8_model), How(output=tmp_path / "c", device=torch.device("meta"), num_workers=1)
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gives_the_bits_of_the_cpu(fp8_model, tmp_path):
    for device in ("cpu", "cuda"):
        back, again = tmp_path / f"{device}-bf16", tmp_path / f"{device}-fp8"
        package.export("fp8-to-bf16", fp8_model, back, device=device, no_verify=True)
        package.export("bf16-to-fp8", back, again, device=device, no_verify=True)
    for kind in ("bf16", "fp8"):
        a, b = tensors_of(tmp_path / f"cpu-{kind}"), tensors_of(tmp_path / f"cuda-{kind}")
        assert all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def test_a_device_whose_casts_are_not_exact_is_left_alone(monkeypatch):
    from kitae.cli.export import _device_of_blocks

    class Inexact:
        def supports(self, feature):
            return feature != "float8", "it rounds otherwise"

    monkeypatch.setattr(
        backends, "pick_device", lambda name="auto", **_: torch.device("cpu" if name == "cpu" else "meta")
    )
    monkeypatch.setattr(backends, "of", lambda _: Inexact())
    assert _device_of_blocks("auto") == torch.device("cpu")
    with pytest.raises(
        ConfigError, match=r"FP8 blocks are not computed there \(it rounds otherwise\); use cpu"
    ):
        _device_of_blocks("npu")
