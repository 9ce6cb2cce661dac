"""Activations kept, recomputed, or offloaded: the same gradients to the bit, and the choice by price."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoConfig

from kitae.config import LoraSettings, ModelSettings, SeamSettings
from kitae.errors import ConfigError
from kitae.models import checkpointing
from kitae.models.activations import activation_bytes, layer_input_bytes
from kitae.recipes._passes import most_tokens
from kitae.settings import resolve
from tests.models.conftest import batch_of, random_row


def gradients(policy, way):
    torch.manual_seed(0)  # for the adapters' dropout
    checkpointing.apply(policy.causal_lm, way)
    batch = batch_of([random_row(n) for n in (30, 12)])
    (-(policy(batch).logprobs_N * batch.weights_N).sum()).backward()
    return {name: p.grad for name, p in policy.named_trainable() if p.grad is not None}


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("qwen3", None),
        ("qwen3", LoraSettings(rank=4, dropout=0.3)),
        ("deepseek_v3", None),
        ("deepseek_v3", LoraSettings(rank=4)),
    ],
)
def test_offloading_changes_no_bit_of_a_gradient(family, lora, kernels, policy_of, monkeypatch):
    moved = []
    there, back = checkpointing._to_host, checkpointing._to_device
    monkeypatch.setattr(checkpointing, "_to_host", lambda tensor: moved.append(tensor.shape) or there(tensor))
    monkeypatch.setattr(checkpointing, "_to_device", lambda packed: moved.append(None) or back(packed))
    seams = SeamSettings(kernels=kernels)
    kept = gradients(policy_of(family, lora=lora, seams=seams), "keep")
    assert not moved
    offloaded = gradients(policy_of(family, lora=lora, seams=seams), "offload")
    assert kept.keys() == offloaded.keys() and len(kept) > 10
    assert all(torch.equal(kept[name], offloaded[name]) for name in kept)
    layers = policy_of(family).config.num_hidden_layers
    assert moved == [moved[0]] * layers + [None] * layers, "each layer's input, there once and back once"


def test_what_is_offloaded_is_a_copy_that_nothing_writes_over():
    tensor = torch.randn(3, 4).t()
    packed = checkpointing._to_host(tensor)
    before = tensor.clone()
    tensor.zero_()
    assert torch.equal(checkpointing._to_device(packed), before)


@pytest.fixture
def config(tiny):
    return AutoConfig.from_pretrained(tiny("qwen3", num_hidden_layers=6))


def chosen(config, setting, *, room, device="cpu"):
    model = ModelSettings(name_or_path="m", gradient_checkpointing=setting)
    how = {"dtype": torch.bfloat16, "device": torch.device(device), "tokens": 4096}
    return checkpointing.choose(model, config, room=room, **how)


def test_auto_takes_the_first_that_fits_and_logs_the_prices(config, caplog):
    caplog.set_level(logging.INFO)
    how = {"num_tokens": 4096, "element": 2}
    kept = activation_bytes(config, **how)
    recomputed = activation_bytes(config, recompute=True, **how)
    assert layer_input_bytes(config, **how) < recomputed < kept
    for device in ("cpu", "meta"):  # meta stands for any accelerator
        assert chosen(config, "auto", room=kept, device=device) == "keep"
        assert chosen(config, "auto", room=kept - 1, device=device) == "recompute"
        assert chosen(config, "auto", room=recomputed, device=device) == "recompute"
    assert chosen(config, "auto", room=recomputed - 1) == "recompute", "on a CPU nothing takes less"
    assert chosen(config, "auto", room=recomputed - 1, device="meta") == "offload"
    assert chosen(config, "auto", room=-5, device="meta") == "offload"
    last = caplog.messages[-1]
    assert (
        "recomputed and offloaded (model.gradient_checkpointing auto): a pass of up to 4,096 tokens" in last
    )
    assert (
        f"{kept / 2**30:.2f} GiB, {recomputed / 2**30:.2f} recomputed" in last and "0.00 GiB are free" in last
    )


def test_without_an_estimate_auto_recomputes_and_says_why(config, caplog):
    caplog.set_level(logging.INFO)
    assert chosen(config, "auto", room=None) == "recompute"
    assert "nothing is known of what a qwen3 model keeps" in caplog.messages[-1]


def test_a_cpu_recomputes_where_offloading_is_asked_for_and_says_so(config, caplog):
    caplog.set_level(logging.INFO)
    assert chosen(config, "offload", room=10) == "recompute"
    assert "a CPU's memory is the host's" in caplog.messages[-1]
    assert chosen(config, "offload", room=10, device="meta") == "offload"
    assert (chosen(config, True, room=10), chosen(config, False, room=10)) == ("recompute", "keep")


def test_a_policy_is_loaded_as_auto_chooses(policy_of):
    assert not policy_of("qwen3", gradient_checkpointing="auto").causal_lm.is_activation_checkpointing
    assert policy_of("qwen3", gradient_checkpointing="offload").causal_lm.is_activation_checkpointing


DISTILL = {"max_length": 50, "teacher.name_or_path": "t", "distill.on_policy_share": 0.5}


@pytest.mark.parametrize(
    ("recipe", "given", "per_forward", "tokens"),
    [
        ("sft", {"per_device_train_batch_size": 4, "max_length": 1000}, None, 4000),
        ("sft", {"per_device_train_batch_size": 4, "max_length": 1000}, 2048, 2048),
        ("sft", {"per_device_train_batch_size": 4, "max_length": 3000}, 2048, 3000),
        ("dpo", {"per_device_train_batch_size": 4, "max_length": 1000}, None, 8000),
        ("dpo", {"per_device_train_batch_size": 4, "max_length": 1500}, 2048, 3000),
        ("kto", {"per_device_train_batch_size": 4, "max_length": 1000}, None, 4000),
        ("kto", {"per_device_train_batch_size": 4, "max_length": 1500}, 2048, 2048),
        ("grpo", {"rows_per_forward": 3, "max_prompt_length": 100, "max_new_tokens": 200}, None, 900),
        ("distill", {"per_device_train_batch_size": 2, **DISTILL}, None, 2 * (1024 + 512)),
    ],
)  # fmt: skip
def test_the_largest_pass_follows_from_the_settings(recipe, given, per_forward, tokens):
    cfg, _ = resolve(recipe, {"model_name_or_path": "m", "dataset_name": "d", **given}, world_size=1)
    assert most_tokens(cfg, per_forward=per_forward) == tokens


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--gradient_checkpointing offload", "offload"),
        ("--gradient_checkpointing auto", "auto"),
        ("--gradient_checkpointing Offload", "offload"),
        ("--gradient_checkpointing", True),
        ("--gradient_checkpointing no", False),
        ("--model.gradient_checkpointing auto", "auto"),
        ("--model.gradient_checkpointing", True),
        ("--model.gradient_checkpointing=false", False),
        ("--activation_offloading", "offload"),
        ("--activation_offloading false", False),
        ("--gradient_checkpointing true --activation_offloading true", "offload"),
        ("", False),
    ],
)
def test_the_setting_is_a_switch_with_two_more_words(words, value):
    cfg, _ = resolve(
        "sft", [*words.split(), "--model_name_or_path", "m", "--dataset_name", "d"], world_size=1
    )
    assert cfg.model.gradient_checkpointing == value


def test_offloading_without_recomputation_is_a_contradiction():
    words = (
        "--gradient_checkpointing false --activation_offloading true --model_name_or_path m --dataset_name d"
    )
    with pytest.raises(
        ConfigError, match=r"given twice: --gradient_checkpointing .* and --activation_offloading"
    ):
        resolve("sft", words.split(), world_size=1)
