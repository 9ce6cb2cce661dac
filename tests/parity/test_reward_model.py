"""Reward models against TRL's trainer: the loss it logs and the step it takes, with margins and centring."""

import random

import pytest
import torch

trl = pytest.importorskip("trl", reason="pip install 'kitae[parity]'")

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

from kitae.algos.reward_model import bradley_terry  # noqa: E402
from kitae.config import ModelSettings, OptimSettings  # noqa: E402
from kitae.data.collate import collate  # noqa: E402
from kitae.models.critic import load_critic  # noqa: E402
from kitae.models.save import save_policy  # noqa: E402
from kitae.parallel.world import World  # noqa: E402
from kitae.recipes._reward_model import with_end  # noqa: E402
from kitae.train.learner import Learner  # noqa: E402
from kitae.types import Row  # noqa: E402

LENGTHS = ((3, 9, 4), (7, 2, 12), (2, 5, 5), (5, 1, 30))
"""Of prompt, chosen and rejected of each pair."""


def ragged_pairs():
    rng = random.Random(0)
    return [[[rng.randrange(8, 90) for _ in range(n)] for n in lengths] for lengths in LENGTHS]


@pytest.fixture(scope="module")
def started(tiny, tmp_path_factory):
    """A reward model with a head that is not zero, in a folder both sides read."""
    folder = tmp_path_factory.mktemp("started")
    critic = load_critic(ModelSettings(name_or_path=str(tiny("llama")), dtype="float32", device="cpu"))
    with torch.no_grad():
        critic.causal_lm.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_policy(critic, folder)
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(folder)
    return folder


def trl_step(folder, output_dir, *, margins, center_coef):
    """One SGD step with learning rate 1 in TRL: the loss it logs, and each weight's step downhill, its gradient."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.config.pad_token_id = 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in ragged_pairs()]
    if margins is not None:
        rows = [row | {"margin": margin} for row, margin in zip(rows, margins, strict=True)]
    args = trl.RewardConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        max_grad_norm=0.0,
        center_rewards_coefficient=center_coef or None,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.RewardTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
    )
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return logged, {name: before[name] - p.detach() for name, p in model.named_parameters()}


def our_step(folder, *, margins, center_coef):
    critic = load_critic(ModelSettings(name_or_path=str(folder), dtype="float32", device="cpu"))
    rows = []
    for number, (prompt, *completions) in enumerate(ragged_pairs()):
        for completion in completions:
            mask = [False] * len(prompt) + [True] * len(completion)
            numbers = {} if margins is None else {"margin": margins[number]}
            row = Row(
                token_ids=prompt + completion, loss_mask=mask, prompt_length=len(prompt), numbers=numbers
            )
            rows.append(with_end(row))
    learner = Learner(critic, optim=OptimSettings(), total_steps=1, world=World())

    def loss_fn(out, weights_N, **given):
        return bradley_terry(out, weights_N, center_coef=center_coef, **given)

    batches = collate(rows, rows_per_forward=4, rows_per_unit=2)
    metrics = learner.forward_backward(batches, loss_fn, denominator=len(LENGTHS))
    return metrics, {name: p.grad.clone() for name, p in critic.named_trainable()}


@pytest.mark.parametrize("center_coef", [0.0, 0.01])
@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 2.0, 1.0]])
def test_a_step_of_a_reward_model_equals_trls(margins, center_coef, started, tmp_path):
    how = {"margins": margins, "center_coef": center_coef}
    theirs, their_step = trl_step(started, tmp_path / "trl", **how)
    ours, our_gradient = our_step(started, **how)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"])
    assert ours["margin"] == pytest.approx(theirs["margin"], rel=1e-4)
    assert ours["reward"] == pytest.approx(theirs["mean_reward"], rel=1e-4, abs=1e-5)
    assert set(our_gradient) == set(their_step)
    for name, step in their_step.items():
        torch.testing.assert_close(our_gradient[name], step, rtol=1e-3, atol=2e-6, msg=name)
