"""Losses against slow obvious versions that loop over tokens."""

import math

import pytest
import torch

from kitae.algos import averaging, kl, losses
from kitae.types import Row, TokenOutputs


def outputs(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(n, generator=generator) * 0.3

    logprobs = (draw() - 1.5).requires_grad_()
    return logprobs, logprobs.detach() + draw(), logprobs.detach() + draw(), draw() * 3, draw().abs()


def slow_clipped(logprobs, old, ref, advantages, weights, *, low, high, coef):
    total = torch.zeros(())
    for i in range(len(logprobs)):
        ratio = torch.exp(logprobs[i] - old[i])
        bounded = torch.clamp(ratio, 1 - low, 1 + high)
        surrogate = torch.min(ratio * advantages[i], bounded * advantages[i])
        r = torch.exp(ref[i] - logprobs[i])
        total = total + weights[i] * (-surrogate + coef * (r - torch.log(r) - 1))
    return total


@pytest.mark.parametrize(("low", "high", "coef"), [(0.2, 0.2, 0.0), (0.2, 0.28, 0.04), (0.1, 0.3, 1.0)])
def test_clipped_policy_gradient_equals_the_formula_in_value_and_gradient(low, high, coef):
    logprobs, old, ref, advantages, weights = outputs()
    loss, metrics = losses.clipped_policy_gradient(
        TokenOutputs(logprobs_N=logprobs), weights, advantages=advantages, old_logprobs=old, ref_logprobs=ref,
        clip_low=low, clip_high=high, kl_coef=coef,
    )  # fmt: skip
    slow = slow_clipped(logprobs, old, ref, advantages, weights, low=low, high=high, coef=coef)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-6)
    (fast_grad,) = torch.autograd.grad(loss, logprobs)
    (slow_grad,) = torch.autograd.grad(slow, logprobs)
    assert torch.allclose(fast_grad, slow_grad, atol=1e-6)
    unclipped = torch.autograd.grad(
        losses.clipped_policy_gradient(
            TokenOutputs(logprobs_N=logprobs), weights, advantages=advantages, old_logprobs=old, clip_low=0.999,
            clip_high=1e9,
        )[0], logprobs)[0]  # fmt: skip
    if coef == 0:
        lost = (fast_grad == 0) & (unclipped != 0)
        assert metrics["clip_fraction"].item() == pytest.approx((lost * weights).sum().item(), rel=1e-5)
        assert 0 < lost.sum() < len(lost)


def test_at_ratio_one_the_gradient_is_the_advantage():
    logprobs = torch.randn(7).requires_grad_()
    advantages, weights = torch.randn(7), torch.ones(7)
    loss, metrics = losses.clipped_policy_gradient(
        TokenOutputs(logprobs_N=logprobs), weights, advantages=advantages, old_logprobs=logprobs.detach()
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(gradient, -advantages)
    assert metrics["approx_kl"] == 0
    assert metrics["clip_fraction"] == 0


def test_a_wildly_different_sampler_gives_finite_numbers():
    logprobs = torch.tensor([-1.0, -400.0, -0.1]).requires_grad_()
    loss, _ = losses.clipped_policy_gradient(
        TokenOutputs(logprobs_N=logprobs), torch.ones(3), advantages=torch.tensor([-1.0, 1.0, -2.0]),
        old_logprobs=torch.tensor([-300.0, -1.0, -200.0]), ref_logprobs=torch.tensor([-1.0, -1.0, -300.0]), kl_coef=0.1,
    )  # fmt: skip
    assert math.isfinite(loss.item())
    assert torch.autograd.grad(loss, logprobs)[0].isfinite().all()


def test_k3_is_unbiased_on_an_exact_distribution():
    p = torch.tensor([0.7, 0.2, 0.1])
    q = torch.tensor([0.3, 0.3, 0.4])
    expected = (p * (p / q).log()).sum()
    estimate = (p * kl.k3(p.log(), q.log())).sum()
    assert estimate.item() == pytest.approx(expected.item(), rel=1e-5)


def test_cross_entropy_is_the_weighted_sum_of_negative_log_probs():
    logprobs = torch.tensor([-1.0, -2.0, -0.5])
    loss, _ = losses.cross_entropy(TokenOutputs(logprobs_N=logprobs), torch.tensor([1.0, 0.5, 2.0]))
    assert loss.item() == pytest.approx(3.0)


def row(taught, prompt=2):
    return Row(token_ids=list(range(prompt + taught)), loss_mask=[False] * prompt + [True] * taught)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token", (2 * 1 + 8 * 3.0) / 10),
        ("sequence", (1 + 3.0) / 2),
        ("constant", (2 * 1 + 8 * 3.0) / (2 * 16)),
    ],
)
def test_each_averaging_is_what_its_paper_says(how, expected):
    """Two completions of 2 and 8 tokens, whose tokens cost 1 and 3 each."""
    rows, denominator = averaging.weigh([row(2), row(8)], how, max_tokens=16)
    total = sum(r.weight * r.num_taught * cost for r, cost in zip(rows, (1.0, 3.0), strict=True))
    assert total / denominator == pytest.approx(expected)
