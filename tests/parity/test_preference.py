"""Loss and gradient of DPO, IPO, robust DPO, SimPO, ORPO and KTO against TRL's own loss code, on given log-probs.

TRL's trainers are made without their __init__, with just the attributes their loss reads; the model is a stand-in that
returns the given log-probs.
"""

from __future__ import annotations

import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from kitae.algos import preference
from kitae.types import TokenOutputs

trl = pytest.importorskip("trl", reason="pip install 'kitae[parity]'")

PAIRS = 4


class Accelerator:
    """What the losses ask of accelerate, on one process."""

    device = torch.device("cpu")

    @staticmethod
    def gather(value):
        return value

    gather_for_metrics = gather


class Given:
    """A stand-in for a model: per-token log-probs that were given."""

    def __init__(self, *logprobs_BS):
        self._given = list(logprobs_BS)

    def __call__(self, input_ids, **_):
        logprobs_BS = self._given.pop(0)
        zeros = torch.zeros_like(logprobs_BS)
        return SimpleNamespace(
            log_probs=logprobs_BS,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=zeros,
        )


def bare(name, package=trl, **attributes):
    trainer_class = getattr(package, name)
    trainer = trainer_class.__new__(trainer_class)
    trainer.model = SimpleNamespace(training=True)
    common = {
        "accelerator": Accelerator(),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for key, value in {**common, **attributes}.items():
        setattr(trainer, key, value)
    return trainer


def case(seed=0, rows=2 * PAIRS):
    """A leaf for gradients, the padded [B, S] log-probs made of it, their mask, and a reference's sum for each row."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 9) for _ in range(rows)]
    width = max(lengths) + 3
    mask_BS = torch.zeros(rows, width, dtype=torch.long)
    for b, length in enumerate(lengths):
        mask_BS[b, 2 : 2 + length] = 1
    torch.manual_seed(seed)
    leaf_BS = (-3 * torch.rand(rows, width - 1) - 0.01).requires_grad_()
    logprobs_BS = leaf_BS * mask_BS[:, 1:]
    reference_B = logprobs_BS.detach().sum(1) + torch.randn(rows)
    return leaf_BS, logprobs_BS, mask_BS, reference_B


def flat(logprobs_BS, mask_BS, order):
    """kitae's outputs: the rows in `order`, only their completions."""
    parts = [logprobs_BS[b][mask_BS[b, 1:].bool()] for b in order]
    row_N = torch.tensor([i for i, part in enumerate(parts) for _ in part])
    return TokenOutputs(torch.cat(parts), row_N=row_N, num_rows=len(parts))


IN_TURN = [b for p in range(PAIRS) for b in (p, PAIRS + p)]
"""TRL lays all chosen rows before all rejected ones; kitae lays them in turn."""


def assert_same(ours, theirs, leaf_BS, *, count):
    """Our sum over `count` is their mean, and so are the gradients."""
    (our_grad,) = torch.autograd.grad(ours / count, leaf_BS, retain_graph=True)
    (their_grad,) = torch.autograd.grad(theirs, leaf_BS)
    assert float(ours.detach()) / count == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert their_grad.abs().max() > 1e-3
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"), [("sigmoid", 0.0), ("ipo", 0.0), ("robust", 0.1), ("robust", 0.0)]
)
def test_dpo_is_trls(loss_type, label_smoothing):
    leaf_BS, logprobs_BS, mask_BS, reference_B = case()
    trainer = bare(
        "DPOTrainer", beta=0.3, loss_types=[loss_type], loss_weights=[1.0], label_smoothing=label_smoothing, ld_alpha=None,
        f_divergence_type="reverse_kl", use_weighting=False, precompute_ref_logps=True,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask_BS),
        "attention_mask": torch.ones_like(mask_BS),
        "completion_mask": mask_BS,
        "ref_chosen_logps": reference_B[:PAIRS],
        "ref_rejected_logps": reference_B[PAIRS:],
    }
    theirs = trainer._compute_loss(Given(logprobs_BS), inputs, return_outputs=False)
    out = flat(logprobs_BS, mask_BS, IN_TURN)
    ours, metrics = preference.dpo(
        out, torch.ones_like(out.logprobs_N), ref_logprob=reference_B[IN_TURN], beta=0.3, loss_type=loss_type,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    assert_same(ours, theirs, leaf_BS, count=PAIRS)
    noted = trainer._metrics["train"]
    assert (
        metrics["accuracy"].item() / PAIRS == pytest.approx(noted["rewards/accuracies"][0])
        or loss_type == "ipo"
    )
    if loss_type != "ipo":  # kitae's rewards are what the loss compares: means per token there
        assert metrics["margin"].item() / PAIRS == pytest.approx(noted["rewards/margins"][0], rel=1e-4)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_and_conservative_smoothing_are_trls(label_smoothing):
    from trl.experimental import cpo

    leaf_BS, logprobs_BS, mask_BS, _ = case()
    trainer = bare(
        "CPOTrainer",
        cpo,
        beta=2.0,
        simpo_gamma=0.8,
        loss_type="simpo",
        alpha=0.0,
        label_smoothing=label_smoothing,
    )
    means_B = logprobs_BS.sum(1) / mask_BS[:, 1:].sum(1)
    losses, chosen, _ = trainer.cpo_loss(means_B[:PAIRS], means_B[PAIRS:])
    out = flat(logprobs_BS, mask_BS, IN_TURN)
    ours, metrics = preference.simpo(
        out, torch.ones_like(out.logprobs_N), beta=2.0, gamma=0.8, label_smoothing=label_smoothing
    )
    assert_same(ours, losses.mean(), leaf_BS, count=PAIRS)
    assert metrics["chosen_reward"].item() / PAIRS == pytest.approx(chosen.mean().item(), rel=1e-5)


def test_orpos_odds_ratio_is_trls():
    """TRL's SFT term also teaches the prompt and averages over the tokens of a batch, so only the ratio is compared."""
    from trl.experimental import orpo

    leaf_BS, logprobs_BS, mask_BS, _ = case()
    trainer = bare("ORPOTrainer", orpo, beta=0.4)
    means_B = logprobs_BS.sum(1) / mask_BS[:, 1:].sum(1)
    their_ratio, *_ = trainer.odds_ratio_loss(means_B[:PAIRS], means_B[PAIRS:])
    theirs = -means_B[:PAIRS].mean() - their_ratio.mean()
    out = flat(logprobs_BS, mask_BS, IN_TURN)
    ours, _ = preference.orpo(out, torch.ones_like(out.logprobs_N), odds_coef=0.4)
    assert_same(ours, theirs, leaf_BS, count=PAIRS)


@pytest.mark.parametrize("seed", [0, 1])
def test_kto_is_trls(seed):
    rows = 2 * PAIRS
    leaf_BS, logprobs_BS, mask_BS, reference_B = case(seed)
    _, other_BS, other_mask_BS, other_reference_B = case(seed + 10)
    label_B = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0])
    trainer = bare(
        "KTOTrainer", beta=0.2, desirable_weight=1.3, undesirable_weight=0.7, loss_type="kto", calculate_KL=True,
        precompute_ref_logps=True,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask_BS),
        "attention_mask": torch.ones_like(mask_BS),
        "completion_mask": mask_BS,
        "KL_input_ids": torch.zeros_like(other_mask_BS),
        "KL_attention_mask": torch.ones_like(other_mask_BS),
        "KL_completion_mask": other_mask_BS,
        "label": label_B,
        "ref_logps": reference_B,
        "ref_KL_logps": other_reference_B,
    }
    theirs = trainer._compute_loss(Given(other_BS, logprobs_BS), inputs, return_outputs=False)
    point = max(float((other_BS.detach().sum(1) - other_reference_B).mean()), 0.0)
    assert trainer._metrics["train"]["kl"] == [pytest.approx(point, abs=1e-6)]
    out = flat(logprobs_BS, mask_BS, range(rows))
    ours, metrics = preference.kto(
        out, torch.ones_like(out.logprobs_N), label=label_B.float(), ref_logprob=reference_B,
        reference_point=torch.full((rows,), point), beta=0.2, desirable_weight=1.3, undesirable_weight=0.7,
    )  # fmt: skip
    assert_same(ours, theirs, leaf_BS, count=rows)
    means = preference.per_side({name: value.item() / rows for name, value in metrics.items()})
    noted = trainer._metrics["train"]
    assert means["margin"] == pytest.approx(noted["rewards/margins"][0], rel=1e-4)
