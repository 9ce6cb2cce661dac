"""PPO's arithmetic against loops that write the papers' formulas out."""

import math

import pytest
import torch

from kitae.algos import ppo
from kitae.types import TokenOutputs

LENGTHS = [7, 1, 4, 12]


def ragged(seed=0, lengths=LENGTHS):
    """Rewards and values of rows of different lengths, and the same filled up with zeros."""
    generator = torch.Generator().manual_seed(seed)
    rewards = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]
    values = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]
    fill = torch.nn.utils.rnn.pad_sequence
    return rewards, values, fill(rewards, batch_first=True), fill(values, batch_first=True)


def slow_gae(rewards, values, *, gamma, lam):
    """arXiv:1506.02438, eq. 16: sum over k of (gamma lam)^k delta_(t+k), delta_t = r_t + gamma V_(t+1) - V_t."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_equal_the_double_sum_on_ragged_rows(gamma, lam):
    rewards, values, rewards_BL, values_BL = ragged()
    found = ppo.gae(rewards_BL, values_BL, gamma=gamma, lam=lam)
    for row, (r, v) in enumerate(zip(rewards, values, strict=True)):
        expected = torch.tensor(slow_gae(r.tolist(), v.tolist(), gamma=gamma, lam=lam))
        torch.testing.assert_close(found[row, : len(r)].float(), expected, rtol=1e-6, atol=1e-6)
        assert not found[row, len(r) :].any()


def test_without_discount_and_lambda_returns_are_sums_of_rewards():
    rewards, _, rewards_BL, values_BL = ragged(1)
    returns = ppo.gae(rewards_BL, values_BL, gamma=1.0, lam=1.0) + values_BL
    for row, r in enumerate(rewards):
        torch.testing.assert_close(returns[row, : len(r)], r.flip(0).cumsum(0).flip(0))


def test_a_round_without_rows_has_no_advantages():
    empty = torch.zeros(0, 0)
    assert ppo.gae(empty, empty).shape == (0, 0)
    assert ppo.token_rewards(torch.zeros(0), empty, torch.zeros(0, dtype=torch.long), kl_coef=1.0).shape == (
        0,
        0,
    )


def test_the_score_is_paid_at_the_last_token_and_the_penalty_at_every_one():
    kl_BL = torch.tensor([[0.5, -0.25, 1.0], [2.0, 0.0, 0.0]])
    found = ppo.token_rewards(torch.tensor([10.0, -1.0]), kl_BL, torch.tensor([3, 1]), kl_coef=0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.05, 0.025, 9.9], [-1.2, 0.0, 0.0]]))


def test_whitening_equals_torch_over_the_numbers_of_all_ranks():
    generator = torch.Generator().manual_seed(3)
    ranks = [torch.randn(n, generator=generator) * 3 + 50 for n in (1, 17, 0, 230)]
    together = torch.cat(ranks)
    totals = sum(ppo.moments(own) for own in ranks)
    expected = (together - together.mean()) / (together.var() + 1e-8).sqrt()
    torch.testing.assert_close(
        torch.cat([ppo.whiten(own, totals) for own in ranks]), expected, rtol=1e-4, atol=1e-5
    )
    kept = torch.cat([ppo.whiten(own, totals, keep_mean=True) for own in ranks])
    torch.testing.assert_close(kept, expected + together.mean(), rtol=1e-4, atol=1e-5)
    assert ppo.variance(totals) == pytest.approx(together.double().var().item())


def test_whitening_equal_or_single_numbers_gives_zeros():
    for numbers in (torch.full((5,), 0.3), torch.tensor([7.0])):
        white = ppo.whiten(numbers, ppo.moments(numbers))
        assert white.abs().max() < 1e-3
    assert ppo.whiten(torch.zeros(0), ppo.moments(torch.zeros(0))).shape == (0,)


def test_the_adaptive_coefficient_moves_by_the_clipped_relative_error():
    controller = ppo.KLController(0.2, target=6.0, horizon=1000)
    controller.update(6.6, completions=100)  # e = 0.1
    assert controller.coef == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    controller.update(60.0, completions=100)  # e = 9, clipped to 0.2
    assert controller.coef == pytest.approx(0.202 * (1 + 0.2 * 0.1))
    controller.update(0.0, completions=500)  # e = -1, clipped to -0.2
    assert controller.coef == pytest.approx(0.202 * 1.02 * (1 - 0.2 * 0.5))


def test_a_fixed_coefficient_stays_and_a_state_comes_back():
    fixed = ppo.KLController(0.05)
    fixed.update(1e6, completions=10_000)
    assert fixed.coef == 0.05
    adaptive = ppo.KLController(0.05, target=1.0, horizon=50)
    adaptive.update(3.0, completions=7)
    again = ppo.KLController(0.05, target=1.0, horizon=50)
    again.load_state(adaptive.state())
    assert again.coef == adaptive.coef != 0.05


def tokens(seed, n=200):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("clip", [0.0, 0.2, 1.0])
def test_the_value_loss_and_its_gradient_equal_a_loop(clip):
    values, returns, old, weights = tokens(4)
    weights = weights.abs()
    values.requires_grad_()
    loss, metrics = ppo.value_loss(
        TokenOutputs(torch.empty(0), values_N=values),
        weights,
        returns=returns,
        old_values=old,
        value_clip=clip,
    )
    loss.backward()
    total, cut = 0.0, 0.0
    gradient = torch.zeros_like(values)
    for n in range(len(values)):
        v, r, v0, w = (x[n].item() for x in (values.detach(), returns, old, weights))
        near = min(max(v, v0 - clip), v0 + clip) if clip else v
        is_cut = (near - r) ** 2 > (v - r) ** 2
        total += 0.5 * w * max((v - r) ** 2, (near - r) ** 2)
        cut += w * is_cut
        gradient[n] = 0.0 if is_cut else w * (v - r)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert metrics["value_clip_fraction"].item() == pytest.approx(cut, rel=1e-5)
    assert (cut > 0) == bool(clip)
    torch.testing.assert_close(values.grad, gradient, rtol=1e-5, atol=1e-6)


def test_the_policy_loss_and_its_gradient_equal_a_loop():
    logprobs, advantages, old, weights = tokens(5)
    logprobs, old, weights = -3 + 0.4 * logprobs, -3 + 0.4 * old, weights.abs()
    logprobs.requires_grad_()
    loss, metrics = ppo.policy_loss(
        TokenOutputs(logprobs), weights, advantages=advantages, old_logprobs=old, clip_low=0.2, clip_high=0.3,
        returns=advantages, old_values=old,
    )  # fmt: skip
    loss.backward()
    total, gradient, cut = 0.0, torch.zeros_like(old), 0.0
    for n in range(len(old)):
        a, w = advantages[n].item(), weights[n].item()
        ratio = math.exp(logprobs[n].item() - old[n].item())
        bounded = min(max(ratio, 0.8), 1.3)
        total -= w * min(ratio * a, bounded * a)  # arXiv:1707.06347, eq. 7
        is_cut = bounded * a < ratio * a
        gradient[n] = 0.0 if is_cut else -w * a * ratio
        cut += w * is_cut
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert metrics["clip_fraction"].item() == pytest.approx(cut, rel=1e-5)
    assert cut > 0
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-4, atol=1e-5)
