"""Critics: scores equal transformers' own, a new head is zero, and what is saved loads with transformers and peft."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from kitae.config import LoraSettings, ModelSettings, OptimSettings
from kitae.errors import ModelError
from kitae.models.critic import Critic, load_critic
from kitae.models.load import load_policy
from kitae.models.save import save_policy
from kitae.parallel.world import World
from kitae.train.learner import Learner
from kitae.types import Row
from tests.models.conftest import ALL_FAMILIES, batch_of, random_row

PROMPT = random_row(7, seed=5).token_ids
ROWS = [random_row(6, prompt=PROMPT), random_row(4, seed=2, prompt=PROMPT), random_row(11)]
LORA = LoraSettings(rank=4)


@pytest.fixture
def critic_of(tiny):
    """A function family -> Critic of the tiny language model, or of any folder."""

    def make(family="qwen3", *, path=None, lora=None, trainable=True, dtype="float32", **settings):
        model = ModelSettings(name_or_path=str(path or tiny(family)), device="cpu", dtype=dtype, **settings)
        return load_critic(model, lora=lora, trainable=trainable)

    return make


def randomise(critic: Critic, seed: int = 0) -> Critic:
    """Move everything that trains a little, the head away from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in critic.named_trainable():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.add_(noise.to(parameter.dtype))
    return critic


def plain_values(classifier, rows) -> torch.Tensor:
    """What transformers' own module says at the token before each taught one, row by row."""
    values = []
    for row in rows:
        ids = torch.tensor([row.token_ids])
        for t in (t for t, is_taught in enumerate(row.loss_mask) if is_taught):
            # transformers reads the score at the last token it is given.
            values.append(classifier(input_ids=ids[:, :t]).logits[0, 0])
    return torch.stack(values)


def plain_classifier(path, **options):
    from transformers import AutoModelForSequenceClassification

    how = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    return AutoModelForSequenceClassification.from_pretrained(path, **{**how, **options})


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_values_and_gradients_equal_transformers_own(family, critic_of, tmp_path):
    critic = randomise(critic_of(family))
    save_policy(critic, tmp_path)
    plain = plain_classifier(tmp_path)
    out = critic(batch_of(ROWS))
    expected = plain_values(plain, ROWS)
    torch.testing.assert_close(out.values_N, expected, rtol=1e-4, atol=1e-5)
    assert out.logprobs_N.shape == (0,)

    out.values_N.square().sum().backward()
    expected.square().sum().backward()
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in critic.named_trainable():
        if name in theirs:
            error = (parameter.grad - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-6)
            assert error < 1e-4, name


def test_a_new_head_is_zero_and_the_layers_are_the_language_models(critic_of, policy_of):
    critic, policy = critic_of(), policy_of()
    assert torch.equal(critic(batch_of(ROWS)).values_N, torch.zeros(sum(r.num_taught for r in ROWS)))
    batch = batch_of(ROWS)
    how = (batch.input_ids_T, batch.positions_T, batch.packing)
    assert torch.equal(critic.hidden(*how), policy.hidden(*how))


def test_packing_and_shared_prompts_do_not_change_values(critic_of):
    critic = randomise(critic_of())
    packed = critic(batch_of(ROWS)).values_N
    apart = critic(batch_of(ROWS, share_prompts=False)).values_N
    alone = torch.cat([critic(batch_of([row])).values_N for row in ROWS])
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


def test_the_value_at_a_prediction_has_not_seen_its_target(critic_of):
    critic = randomise(critic_of())
    row = random_row(9)
    changed = Row(token_ids=[*row.token_ids[:-1], 50], loss_mask=row.loss_mask)
    assert row.token_ids[-1] != 50
    assert torch.equal(critic(batch_of([row])).values_N, critic(batch_of([changed])).values_N)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_critic_trains_its_head_and_loads_with_peft(quantization, critic_of, tiny, tmp_path):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    critic = critic_of("llama", lora=LORA, quantization=quantization)
    names = [name for name, _ in critic.named_trainable()]
    assert "score.modules_to_save.default.weight" in names
    assert not any("score" in name and "lora" in name for name in names)
    randomise(critic)
    expected = critic(batch_of(ROWS)).values_N
    save_policy(critic, tmp_path)

    again = critic_of(path=tmp_path, lora=LORA, quantization=quantization)
    assert torch.equal(again(batch_of(ROWS)).values_N, expected)
    if quantization == "none":
        from peft import PeftModel

        base = plain_classifier(tiny("llama"), num_labels=1)
        plain = PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(plain_values(plain, ROWS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_language_models_adapter_starts_a_critic_with_a_new_head(family, critic_of, policy_of, tmp_path):
    policy = randomise(policy_of(family, lora=LORA))
    save_policy(policy, tmp_path)
    critic = critic_of(path=tmp_path, lora=LORA)
    batch = batch_of(ROWS)
    how = (batch.input_ids_T, batch.positions_T, batch.packing)
    assert torch.equal(critic.hidden(*how), policy.hidden(*how))
    assert not critic(batch).values_N.any()
    assert "score.modules_to_save.default.weight" in dict(critic.named_trainable())


def test_the_head_stays_in_float32_beside_bfloat16_layers(critic_of, tmp_path):
    critic = randomise(critic_of(dtype="bfloat16"))
    assert critic.causal_lm.score.weight.dtype == torch.float32
    assert critic(batch_of(ROWS)).values_N.dtype == torch.float32
    save_policy(critic, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["score.weight"].dtype == torch.float32
    assert saved["model.norm.weight"].dtype == torch.bfloat16
    again = critic_of(path=tmp_path, dtype="bfloat16")
    assert torch.equal(again(batch_of(ROWS)).values_N, critic(batch_of(ROWS)).values_N)


def test_the_saved_configuration_says_one_label(critic_of, tmp_path):
    save_policy(critic_of(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"}


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_learner_trains_a_critic_towards_given_values(lora, critic_of):
    critic = critic_of(lora=lora)
    learner = Learner(critic, optim=OptimSettings(learning_rate=1e-2), total_steps=30, world=World())
    wanted_N = torch.linspace(-1, 1, sum(r.num_taught for r in ROWS))

    def loss_fn(out, weights_N):
        return ((out.values_N - wanted_N).square() * weights_N).sum(), {}

    for _ in range(30):
        metrics = learner.forward_backward([batch_of(ROWS)], loss_fn, denominator=len(wanted_N))
        learner.optim_step()
    assert metrics["loss"] < 0.05
    [values_N] = learner.values([batch_of(ROWS)])
    assert (values_N - wanted_N).abs().max() < 0.5


def test_a_classifier_is_no_language_model_and_several_labels_are_no_score(critic_of, tiny, tmp_path):
    save_policy(critic_of(), tmp_path / "rm")
    with pytest.raises(
        ModelError, match=r"reward model or another classifier .* name the model it was made of"
    ):
        load_policy(ModelSettings(name_or_path=str(tmp_path / "rm"), device="cpu"))
    three = plain_classifier(tiny("llama"), num_labels=3)
    three.save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="classifier of 3 labels"):
        critic_of(path=tmp_path / "three")


def test_a_critic_that_trains_on_from_a_saved_one_has_its_head(critic_of, tmp_path):
    critic = randomise(critic_of())
    save_policy(critic, tmp_path)
    again = critic_of(path=tmp_path)
    assert torch.equal(again.causal_lm.score.weight, critic.causal_lm.score.weight)
