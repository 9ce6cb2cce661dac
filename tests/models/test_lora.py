"""Adapters against peft's own computation, what they cover, and their round trip through peft's folders."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from kitae.config import LoraSettings, ModelSettings, SeamSettings
from kitae.errors import ConfigError, ModelError
from kitae.models.load import load_policy
from kitae.models.lora import coverage, coverage_table, find_targets, zero_gradient_adapters
from kitae.models.save import save_policy
from tests.models.conftest import batch_of, plain_nll, random_row

LORA = LoraSettings(rank=4, alpha=6)
ROWS = [random_row(n) for n in (37, 5, 2, 64)]


def loss_of(policy, batch=None):
    batch = batch or batch_of(ROWS)
    logprobs, *_ = policy(batch)
    return -(logprobs * batch.weights_N).sum()


def randomise(policy) -> None:
    """Adapters as after some training; a fresh one changes nothing because its B is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in policy.named_trainable():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def load_in_peft(base, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False)


@pytest.mark.parametrize("family", ["qwen3", "llama", "deepseek_v3"])
def test_loss_and_gradients_equal_peft_on_the_plain_module(family, policy_of, tiny, tmp_path):
    policy = policy_of(family, lora=LORA)
    randomise(policy)
    save_policy(policy, tmp_path)
    model = load_in_peft(tiny(family), tmp_path)

    loss, expected = loss_of(policy), plain_nll(model, ROWS)
    loss.backward()
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(theirs) == len(policy.named_trainable())
    for name, parameter in policy.named_trainable():
        grad = theirs[f"base_model.model.{name}"].grad
        error = (parameter.grad - grad).abs().max() / grad.abs().max().clamp(min=1e-6)
        assert error < 1e-5, f"{name}: {error:.2e}"


def test_experts_adapters_equal_peft_with_the_seam_off_too(policy_of):
    losses = []
    for on in (True, False):
        policy = policy_of("deepseek_v3", lora=LORA, seams=SeamSettings(experts=on))
        randomise(policy)
        losses.append(loss_of(policy).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_all_linear_covers_every_linear_but_the_head_and_fused_experts(policy_of):
    found = coverage(policy_of("deepseek_v3", lora=LORA).causal_lm)
    counts = {row.target: (row.adapted, row.layers) for row in found.rows}
    assert counts == {
        "self_attn.q_a_proj": (2, 2), "self_attn.q_b_proj": (2, 2), "self_attn.kv_a_proj_with_mqa": (2, 2),
        "self_attn.kv_b_proj": (2, 2), "self_attn.o_proj": (2, 2),
        "mlp.gate_proj": (1, 1), "mlp.up_proj": (1, 1), "mlp.down_proj": (1, 1),
        "mlp.shared_experts.gate_proj": (1, 1), "mlp.shared_experts.up_proj": (1, 1),
        "mlp.shared_experts.down_proj": (1, 1),
        "mlp.experts.gate_up_proj": (1, 1), "mlp.experts.down_proj": (1, 1),
    }  # fmt: skip
    experts = next(row for row in found.rows if row.target == "mlp.experts.gate_up_proj")
    assert experts.parameters == 8 * 4 * (64 + 2 * 32)
    assert found.trainable == sum(row.parameters for row in found.rows)
    assert found.expert_bytes == 8 * 3 * 32 * 64 * 4
    assert coverage_table(found).row_count == len(found.rows)


@pytest.mark.parametrize(
    ("family", "targets", "adapted"),
    [
        ("qwen3", ["q_proj", "v_proj"], {"self_attn.q_proj": 2, "self_attn.v_proj": 2}),
        ("qwen3", ["layers.1.mlp.up_proj"], {"mlp.up_proj": 1}),
        ("deepseek_v3", ["o_proj", "mlp.down_proj"], {"self_attn.o_proj": 2, "mlp.down_proj": 1}),
        ("deepseek_v3", ["experts"], {"mlp.experts.gate_up_proj": 1, "mlp.experts.down_proj": 1}),
        ("deepseek_v3", ["shared_experts.up_proj"], {"mlp.shared_experts.up_proj": 1}),
        (
            "deepseek_v3",
            ["gate_proj", "up_proj", "down_proj"],
            {
                "mlp.gate_proj": 1, "mlp.up_proj": 1, "mlp.down_proj": 1, "mlp.shared_experts.gate_proj": 1,
                "mlp.shared_experts.up_proj": 1, "mlp.shared_experts.down_proj": 1, "mlp.experts.gate_up_proj": 1,
                "mlp.experts.down_proj": 1,
            },
        ),
    ],
)  # fmt: skip
def test_named_targets_adapt_what_they_name_and_nothing_else(family, targets, adapted, policy_of):
    lora = LoraSettings(rank=2, target_modules=targets)
    found = coverage(policy_of(family, lora=lora).causal_lm)
    assert {row.target: row.adapted for row in found.rows if row.adapted} == adapted


def test_a_target_that_adapts_nothing_is_refused_with_the_nearest_name(policy_of):
    with pytest.raises(
        ModelError, match=r"'q_porj' adapts nothing in this qwen3 model; did you mean 'q_proj'"
    ):
        policy_of("qwen3", lora=LoraSettings(rank=2, target_modules=["v_proj", "q_porj"]))


def test_a_model_without_linear_layers_is_refused(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(vocab_size=112, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = ModelSettings(name_or_path=str(tmp_path), device="cpu", dtype="float32")
    with pytest.raises(ModelError, match=r"this gpt2 model has no linear layers, .*; set lora\.rank to 0"):
        load_policy(settings, lora=LoraSettings(rank=2))
    assert len(load_policy(settings).layers) == 2


def test_half_of_a_fused_tensor_is_refused(policy_of):
    with pytest.raises(ModelError, match="name both"):
        policy_of("deepseek_v3", lora=LoraSettings(rank=2, target_modules=["gate_proj"]))


def test_dropout_on_fused_experts_is_refused(policy_of):
    with pytest.raises(ConfigError, match=r"lora\.dropout is 0\.1"):
        policy_of("deepseek_v3", lora=LoraSettings(rank=2, dropout=0.1))


def test_start_values_depend_on_name_and_seed_only(policy_of):
    def values(**settings):
        torch.manual_seed(len(settings))
        policy = policy_of("qwen3", lora=LoraSettings(**{"rank": 4, **settings}))
        return dict(policy.named_trainable())

    all_linear, some, other = values(), values(target_modules=["q_proj"]), values(init_seed=1)
    assert len(some) == 4 < len(all_linear)
    for name, parameter in some.items():
        assert torch.equal(parameter, all_linear[name])
        assert ("lora_B" in name) == torch.equal(parameter, other[name])
        if "lora_A" in name:
            assert parameter.abs().max() <= 1 / 8
            assert parameter.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.15)
        else:
            assert not parameter.any()


def test_switching_the_adapter_off_gives_the_plain_model(policy_of, plain_model):
    policy = policy_of("deepseek_v3", lora=LORA)
    randomise(policy)
    names = [n for n, _ in policy.named_trainable()]
    with torch.no_grad():
        adapted = loss_of(policy)
        expected = plain_nll(plain_model("deepseek_v3"), ROWS)
        for context in (policy.without_adapter, policy.reference):
            with context():
                assert loss_of(policy).item() == pytest.approx(expected.item(), rel=1e-6)
        assert loss_of(policy).item() == adapted.item() != pytest.approx(expected.item(), rel=1e-4)
    assert [n for n, _ in policy.named_trainable()] == names


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_an_adapter_goes_on_training_with_a_frozen_copy_as_its_reference(family, policy_of, tmp_path):
    first = policy_of(family, lora=LORA)
    randomise(first)
    save_policy(first, tmp_path)
    second = policy_of(family, lora=LORA, path=tmp_path)
    assert {n for n, _ in second.named_trainable()} == {n for n, _ in first.named_trainable()}
    assert coverage(second.causal_lm) == coverage(first.causal_lm)
    with torch.no_grad():
        start = loss_of(second)
        assert start.item() == loss_of(first).item()
        for _, parameter in second.named_trainable():
            parameter.add_(0.03)
        moved = loss_of(second)
        with second.reference():
            assert loss_of(second).item() == start.item()
        assert loss_of(second).item() == moved.item() != start.item()
    assert {n for n, _ in second.named_trainable()} == {n for n, _ in first.named_trainable()}


def test_a_trained_adapter_loads_for_use_without_naming_its_rank(policy_of, tmp_path):
    policy = policy_of("qwen3", lora=LORA)
    randomise(policy)
    save_policy(policy, tmp_path)
    again = load_policy(
        ModelSettings(name_or_path=str(tmp_path), dtype="float32", device="cpu"), trainable=False
    )
    assert again.named_trainable() == []
    assert not again.training
    assert loss_of(again).item() == loss_of(policy).item()


def test_an_adapter_goes_on_with_its_own_settings_and_the_log_names_them(policy_of, tmp_path, caplog):
    save_policy(policy_of("qwen3", lora=LORA), tmp_path)
    wanted = LoraSettings(rank=4, alpha=64)
    policy = load_policy(
        ModelSettings(name_or_path=str(tmp_path), device="cpu", dtype="float32"), lora=wanted
    )
    assert f"the adapter in {tmp_path} goes on as it was made, with alpha 6.0" in caplog.text
    assert policy.peft.peft_config["default"].lora_alpha == 6


def test_going_on_with_another_rank_is_refused(policy_of, tmp_path):
    save_policy(policy_of("qwen3", lora=LORA), tmp_path)
    with pytest.raises(
        ConfigError, match=r"lora.rank is 8, but the adapter in .* has rank 4; set lora.rank = 4"
    ):
        policy_of("qwen3", lora=LoraSettings(rank=8), path=tmp_path)
    with pytest.raises(ConfigError, match=r"set lora\.rank = 4"):
        policy_of("qwen3", path=tmp_path)


def test_saving_takes_the_learners_tensors_instead_of_the_modules(policy_of, tiny, tmp_path):
    policy = policy_of("qwen3", lora=LORA)
    tensors = {n: torch.full(p.shape, 0.02, dtype=torch.float32) for n, p in policy.named_trainable()}
    save_policy(policy, tmp_path, tensors=tensors)
    model = load_in_peft(tiny("qwen3"), tmp_path)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    assert len(adapters) == len(tensors)
    assert all(torch.equal(p, torch.full_like(p, 0.02)) for p in adapters)


def test_adapters_that_cannot_move_are_listed_after_the_first_backward(policy_of):
    policy = policy_of("qwen3", lora=LORA)
    loss_of(policy).backward()
    assert zero_gradient_adapters(policy.causal_lm) == []
    dead = "model.layers.1.mlp.up_proj"
    for name, parameter in policy.named_trainable():
        if name.startswith(dead):
            parameter.grad = None
    assert zero_gradient_adapters(policy.causal_lm) == [dead]
    for _, parameter in policy.named_trainable():
        parameter.grad, parameter.main_grad = None, torch.ones_like(parameter)
    assert zero_gradient_adapters(policy.causal_lm) == []


def test_rslora_scales_by_the_root_of_the_rank(policy_of, tiny, tmp_path):
    policy = policy_of("qwen3", lora=LoraSettings(rank=4, alpha=6, use_rslora=True))
    layer = policy.causal_lm.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 3.0


def test_trained_biases_have_no_reference(policy_of):
    policy = policy_of("qwen2", lora=LoraSettings(rank=2, bias="all"))
    assert any(n.endswith("bias") for n, _ in policy.named_trainable())
    with pytest.raises(ConfigError, match=r"lora\.bias"), policy.reference():
        pass


def test_frozen_layers_below_the_first_adapter_need_no_gradient(policy_of):
    policy = policy_of("qwen3", lora=LORA, gradient_checkpointing=True)
    seen = []
    embeddings = policy.causal_lm.get_input_embeddings()
    embeddings.register_forward_hook(lambda _m, _i, out: seen.append(out.requires_grad))
    loss_of(policy).backward()
    assert seen == [False]
    assert zero_gradient_adapters(policy.causal_lm) == []


def test_targets_of_a_model_without_experts_are_linears_only(plain_model):
    targets = find_targets(plain_model("llama"), "all-linear")
    assert len(targets.linears) == 14
    assert targets.fused == []


def edit_adapter(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("trainable", [True, False])
def test_an_adapter_of_another_model_is_refused_with_names_and_shapes(trainable, policy_of, tmp_path):
    save_policy(policy_of("qwen3", lora=LORA), tmp_path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    deeper = name.replace("layers.1", "layers.7")

    def load():
        settings = ModelSettings(name_or_path=str(tmp_path), dtype="float32", device="cpu")
        load_policy(settings, trainable=trainable, lora=LORA if trainable else None)

    load()
    edit_adapter(tmp_path, lambda tensors: tensors.update({deeper: torch.zeros_like(tensors[name])}))
    with pytest.raises(
        ModelError, match=rf"without a place there: {re.escape(deeper)} \[4, 64\]; use it with"
    ):
        load()
    edit_adapter(tmp_path, lambda tensors: (tensors.pop(deeper), tensors.pop(name)))
    with pytest.raises(ModelError, match=rf"missing in it: {re.escape(name)}; use it with"):
        load()
    edit_adapter(tmp_path, lambda tensors: tensors.update({name: torch.zeros(4, 60)}))
    with pytest.raises(ModelError, match=r"does not fit this model: .*size mismatch.*q_proj"):
        load()
