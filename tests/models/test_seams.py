"""Seams on and off, against transformers' plain module: loss and every gradient, in float32."""

from __future__ import annotations

import logging

import pytest
import torch

from kitae.config import LoraSettings, ModelSettings, SeamSettings
from kitae.errors import ModelError
from kitae.models import native, seams
from kitae.models.load import load_policy
from tests.models.conftest import (
    ALL_FAMILIES,
    assert_same_gradients,
    batch_of,
    plain_nll,
    random_row,
)

LENGTHS = (37, 5, 2, 130, 64, 64, 11)
NO_GPU = SeamSettings(flex=False)
OFF = SeamSettings(attention=False, head=False, experts=False, rmsnorm=False, flex=False, kernels=False)


def loss_of(policy, batch, *, as_coefficients: bool = True) -> torch.Tensor:
    coefficients = -batch.weights_N if as_coefficients else None
    logprobs, *_ = policy(batch, coefficients_N=coefficients)
    return -(logprobs * batch.weights_N).sum()


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("seams", [NO_GPU, OFF], ids=["on", "off"])
def test_packed_rows_have_the_loss_and_gradients_of_the_plain_module(family, seams, policy_of, plain_model):
    rows = [random_row(n, seed=i) for i, n in enumerate(LENGTHS)]
    policy, model = policy_of(family, seams=seams), plain_model(family)
    assert policy.seams == seams

    loss = loss_of(policy, batch_of(rows))
    loss.backward()
    expected = plain_nll(model, rows)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(policy, model)


def test_qwen3_with_experts_has_the_loss_and_gradients_of_the_plain_module(policy_of, plain_model, tmp_path):
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        **SMALL, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    rows = [random_row(n) for n in (20, 3, 40)]
    policy, model = policy_of(path=tmp_path), plain_model(path=tmp_path)
    assert policy.family.is_tested
    assert policy.seams == SeamSettings(flex=False)
    loss_of(policy, batch_of(rows)).backward()
    plain_nll(model, rows).backward()
    assert_same_gradients(policy, model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_half_precision_is_close_to_float32_and_trains(family, dtype, rank, policy_of, tiny):
    lora = LoraSettings(rank=rank) if rank else None
    batch = batch_of([random_row(n, prompt=random_row(5).token_ids) for n in (20, 3, 40)])
    settings = ModelSettings(name_or_path=str(tiny(family)), dtype=dtype, device="cpu")
    policy = load_policy(settings, lora=lora)
    logprobs, entropy, *_ = policy(batch, with_entropy=True, coefficients_N=-batch.weights_N)
    assert logprobs.dtype == entropy.dtype == torch.float32
    (-logprobs * batch.weights_N).sum().backward()
    for name, parameter in policy.named_trainable():
        grad = parameter.grad
        assert grad is not None or ".experts." in name  # an expert no token went to
        assert grad is None or (grad.isfinite().all() and grad.dtype == parameter.dtype), name
    with torch.no_grad():
        expected, *_ = policy_of(family)(batch)
    assert (logprobs - expected).abs().mean() < 0.02


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_shared_prompt_equals_separate_rows(family, policy_of, plain_model):
    prompts = [random_row(n).token_ids for n in (9, 40)]
    rows = [random_row(n, seed=i, prompt=prompts[i // 4]) for i, n in enumerate((1, 33, 7, 70, 12, 2, 3, 50))]
    rows.append(random_row(21, seed=9))  # a row that shares nothing
    policy, model = policy_of(family), plain_model(family)
    batch = batch_of(rows)
    assert batch.packing.num_real_tokens < sum(len(row.token_ids) for row in rows)

    loss = loss_of(policy, batch)
    loss.backward()
    expected = plain_nll(model, rows)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(policy, model)
    separate, *_ = policy(batch_of(rows, share_prompts=False))
    torch.testing.assert_close(policy(batch)[0], separate, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seam", ["attention", "head", "experts", "rmsnorm"])
def test_one_seam_off_changes_nothing(seam, policy_of):
    rows = [random_row(n) for n in (3, 40, 17)]
    with torch.no_grad():
        expected, *_ = policy_of("deepseek_v3")(batch_of(rows))
        found, *_ = policy_of("deepseek_v3", seams=SeamSettings(**{seam: False}))(batch_of(rows))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_experts_seam_really_runs_and_skips_frozen_weights(policy_of):
    policy = policy_of("deepseek_v3")
    by_kernels = native.library() is not None
    assert policy.config._experts_implementation == (seams.NATIVE_NAME if by_kernels else seams.NAME)
    frozen = [p for n, p in policy.named_trainable() if ".experts." in n]
    assert len(frozen) == 2
    for parameter in frozen:
        parameter.requires_grad_(False)
    loss_of(policy, batch_of([random_row(20)])).backward()
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for n, p in policy.named_trainable())


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_gradients_go_to_main_grad_where_the_learner_set_one(family, policy_of, plain_model):
    rows = [random_row(n) for n in (30, 12)]
    policy, model = policy_of(family), plain_model(family)
    for _, parameter in policy.named_trainable():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    for _ in range(2):  # accumulates, as over micro-batches
        loss_of(policy, batch_of(rows)).backward()
    (2 * plain_nll(model, rows)).backward()
    for _, parameter in policy.named_trainable():  # what the learner does with ordinary gradients
        if parameter.grad is not None:
            parameter.main_grad += parameter.grad
        parameter.grad = parameter.main_grad
    expected = {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in policy.named_trainable():
        if name not in expected:
            parameter.grad = None
    assert_same_gradients(policy, model)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_gradient_checkpointing_changes_no_gradient(family, policy_of):
    batch = batch_of([random_row(n) for n in (30, 12)])
    grads = []
    for on in (False, True):
        policy = policy_of(family, gradient_checkpointing=on)
        assert policy.causal_lm.is_activation_checkpointing is on
        loss_of(policy, batch).backward()
        grads.append([p.grad for _, p in policy.named_trainable()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_padding_tokens_have_no_gradient_and_are_finite(policy_of):
    policy = policy_of("deepseek_v3")
    batch = batch_of([random_row(5), random_row(3)])
    real = batch.packing.num_real_tokens
    assert batch.packing.num_tokens == 128 > real
    outputs, embeddings = [], policy.causal_lm.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _m, _i, out: out.retain_grad() or outputs.append(out))
    loss_of(policy, batch).backward()
    handle.remove()
    assert outputs[0].grad[0, :real].abs().sum() > 0
    assert torch.equal(outputs[0].grad[0, real:], torch.zeros(128 - real, 64))
    assert policy.hidden(batch.input_ids_T, batch.positions_T, batch.packing).isfinite().all()


def test_logits_of_hidden_states_are_the_plain_modules(policy_of, plain_model):
    row = random_row(25)
    policy, model, batch = policy_of("llama"), plain_model("llama"), batch_of([row])
    with torch.no_grad():
        hidden = policy.hidden(batch.input_ids_T, batch.positions_T, batch.packing)
        expected = model(input_ids=torch.tensor([row.token_ids])).logits[0]
        torch.testing.assert_close(policy.logits(hidden[:25]), expected, rtol=1e-5, atol=1e-5)


def test_a_cache_object_takes_over_attention(policy_of):
    class Recorder:
        def __init__(self):
            self.layers = []

        def attend(self, layer_idx, q_TQD, k_TKD, v_TKD, packing, scaling):
            from kitae.models.attention import attend

            self.layers.append((layer_idx, q_TQD.shape, k_TKD.shape, v_TKD.shape))
            return attend(q_TQD, k_TKD, v_TKD, packing, scaling=scaling, kernels=policy.seams.kernels)

    policy, batch, cache = policy_of("deepseek_v3"), batch_of([random_row(7)]), Recorder()
    with torch.no_grad():
        found = policy.hidden(batch.input_ids_T, batch.positions_T, batch.packing, cache=cache)
        expected = policy.hidden(batch.input_ids_T, batch.positions_T, batch.packing)
    assert torch.equal(found, expected)
    assert cache.layers == [(i, (128, 4, 24), (128, 4, 24), (128, 4, 16)) for i in range(2)]


def save_untested(folder, config):
    """A random model of an architecture outside the tested families."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return load_policy(ModelSettings(name_or_path=str(folder), device="cpu", dtype="float32"))


SMALL = {
    "vocab_size": 112, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip


def _untested_configs():
    import transformers as t

    yield "mistral", t.MistralConfig(**SMALL, sliding_window=None), {"attention": True, "head": True}
    yield "mistral_window", t.MistralConfig(**SMALL, sliding_window=8), {"attention": False, "head": True}
    yield "granite", t.GraniteConfig(**SMALL, logits_scaling=4.0), {"attention": True, "head": False}
    yield "gemma2", t.Gemma2Config(**SMALL, head_dim=16), {"attention": False, "head": False}
    yield "mixtral", t.MixtralConfig(**SMALL, num_local_experts=4), {"attention": True, "experts": True}
    yield (
        "gpt2",
        t.GPT2Config(vocab_size=112, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=2),
        {"head": True},
    )
    yield (
        "bloom",
        t.BloomConfig(vocab_size=112, hidden_size=64, n_layer=2, n_head=4, pad_token_id=0),
        {"attention": False},
    )
    mamba = t.MambaConfig(vocab_size=112, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    yield "mamba", mamba, {"attention": False}


@pytest.mark.parametrize(
    ("config", "expected"), [pytest.param(c, e, id=n) for n, c, e in _untested_configs()]
)
def test_an_untested_architecture_gives_its_own_log_probs_with_the_seams_it_bears(
    config, expected, tmp_path, caplog
):
    caplog.set_level(logging.INFO, logger="kitae")
    policy = save_untested(tmp_path, config)
    assert {k: getattr(policy.seams, k) for k in expected} == expected
    for seam in ("attention", "head"):
        if not getattr(policy.seams, seam):
            assert f"{seam} seam off" in caplog.text
    rows = [random_row(20), random_row(9), random_row(4, prompt=random_row(6).token_ids)]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        loss, plain = loss_of(policy.eval(), batch_of(rows)), plain_nll(model, rows)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)


def test_an_architecture_that_makes_logits_in_a_way_of_its_own_is_refused(tmp_path):
    from transformers import FalconH1Config

    config = FalconH1Config(
        **SMALL, lm_head_multiplier=0.25, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1
    )
    with pytest.raises(
        ModelError, match="falcon_h1 models make their logits of hidden states in a way that kitae"
    ):
        save_untested(tmp_path, config)


def test_a_norm_that_adds_one_to_its_weight_is_left_alone():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    from kitae.models.blocks import fuse_rmsnorms

    assert fuse_rmsnorms(torch.nn.ModuleList([Qwen3RMSNorm(8), GemmaRMSNorm(8)])) == 1
