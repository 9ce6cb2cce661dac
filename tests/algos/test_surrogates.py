"""GRPO's variants against slow versions that loop over completions and tokens, as the papers write them."""

import math

import pytest
import torch

from kitae.algos import losses, surrogates
from kitae.algos.overlong import soft_penalty
from kitae.types import TokenOutputs

LENGTHS = [3, 1, 7, 4, 9]


def made(seed=0, lengths=LENGTHS, spread=0.5):
    """Completions with their own advantage each; every stream differs from the others."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    row_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    logprobs = (torch.randn(n, generator=g) * 0.3 - 1.5).requires_grad_()
    entropy = (torch.rand(n, generator=g) + 0.5).requires_grad_()
    streams = {
        "advantages": torch.randn(len(lengths), generator=g)[row_N] * 2,
        "old_logprobs": logprobs.detach() + torch.randn(n, generator=g) * spread,
        "ref_logprobs": logprobs.detach() + torch.randn(n, generator=g) * 0.3,
        "sampler_logprobs": logprobs.detach() + torch.randn(n, generator=g) * spread,
    }
    weights = torch.rand(len(lengths), generator=g)[row_N] + 0.1
    out = TokenOutputs(logprobs_N=logprobs, entropy_N=entropy, row_N=row_N, num_rows=len(lengths))
    return out, weights, streams


def slow(out, weights, streams, *, objective="clip", ratio="token", low=0.2, high=0.28, dual=0.0, kl=0.0, bonus=0.0,
         cap=0.0):  # fmt: skip
    """Completion by completion and token by token."""
    total, clipped = torch.zeros(()), 0.0
    for b in range(out.num_rows):
        own = [t for t in range(len(out.row_N)) if out.row_N[t] == b]
        differences = [out.logprobs_N[t] - streams["old_logprobs"][t] for t in own]
        s = torch.exp(sum(differences) / len(own))  # arXiv:2507.18071, eq. 7
        for t, difference in zip(own, differences, strict=True):
            r, a = (s if ratio == "sequence" else torch.exp(difference)), streams["advantages"][t]
            if objective == "cispo":  # arXiv:2506.13585, eq. 4 and 5, without a lower bound
                weight = min(r.item(), 1 + high)
                term = weight * a * out.logprobs_N[t]
                clipped += weights[t].item() * (r.item() > 1 + high)
            else:
                term = torch.min(r * a, torch.clamp(r, 1 - low, 1 + high) * a)
                if dual and a < 0:
                    term = torch.max(term, dual * a)  # arXiv:1912.09729, eq. 5
                (gradient,) = torch.autograd.grad(term, out.logprobs_N, retain_graph=True, allow_unused=True)
                is_cut = gradient is None or gradient[t] == 0
                clipped += weights[t].item() * bool(is_cut)
            if cap:
                gap = streams["old_logprobs"][t] - streams["sampler_logprobs"][t]
                term = term * min(math.exp(gap), cap)
            x = torch.exp(streams["ref_logprobs"][t] - out.logprobs_N[t])
            total = total - weights[t] * (term - kl * (x - torch.log(x) - 1) + bonus * out.entropy_N[t])
    return total, clipped


CASES = {
    "token": {},
    "sequence (GSPO)": {"ratio": "sequence", "low": 0.05, "high": 0.06},
    "cispo": {"objective": "cispo"},
    "cispo of sequences": {"objective": "cispo", "ratio": "sequence", "high": 0.05},
    "dual clip": {"dual": 1.4},
    "dual clip of sequences": {"ratio": "sequence", "dual": 1.05, "low": 0.01, "high": 0.01},
    "entropy bonus": {"bonus": 0.3},
    "truncated weights": {"cap": 1.2},
    "everything": {"objective": "cispo", "cap": 2.0, "bonus": 0.1, "kl": 0.5},
    "sequences with a KL term": {"ratio": "sequence", "kl": 0.5, "cap": 1.1},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_variant_equals_the_slow_version_in_value_and_gradient(name, seed):
    how = CASES[name]
    out, weights, streams = made(seed)
    expected, clipped = slow(out, weights, streams, **how)
    if not how.get("kl"):
        streams.pop("ref_logprobs")
    loss, metrics = surrogates.policy_gradient(
        out, weights, **streams, objective=how.get("objective", "clip"), ratio=how.get("ratio", "token"),
        clip_low=how.get("low", 0.2), clip_high=how.get("high", 0.28), dual_clip=how.get("dual", 0.0),
        kl_coef=how.get("kl", 0.0), entropy_coef=how.get("bonus", 0.0), is_cap=how.get("cap", 0.0),
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    leaves = (out.logprobs_N, out.entropy_N)
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert metrics["clip_fraction"].item() == pytest.approx(clipped, rel=1e-5)
    assert clipped > 0, "the case has nothing to clip"


def test_with_no_variant_the_loss_is_the_plain_one():
    out, weights, streams = made()
    streams.pop("sampler_logprobs")
    how = {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.1}
    loss, metrics = surrogates.policy_gradient(out, weights, **streams, **how)
    plain, plain_metrics = losses.clipped_policy_gradient(out, weights, **streams, **how)
    assert loss.item() == plain.item()
    assert {k: v.item() for k, v in metrics.items()} == {k: v.item() for k, v in plain_metrics.items()}


def test_a_sequence_ratio_gives_every_token_of_a_completion_the_same_gradient():
    out, _, streams = made(spread=0.01)
    del streams["ref_logprobs"], streams["sampler_logprobs"]
    loss, _ = surrogates.policy_gradient(
        out, torch.ones(sum(LENGTHS)), **streams, ratio="sequence", clip_low=0.9
    )
    (gradient,) = torch.autograd.grad(loss, out.logprobs_N)
    for part in gradient.split(LENGTHS):
        torch.testing.assert_close(part, part[:1].expand_as(part))
        assert part[0] != 0


def test_cispo_keeps_the_gradient_of_a_token_that_the_clip_would_cut():
    logprobs = torch.tensor([-1.0]).requires_grad_()
    out = TokenOutputs(logprobs_N=logprobs, row_N=torch.tensor([0]), num_rows=1)
    streams = {"advantages": torch.tensor([1.0]), "old_logprobs": torch.tensor([-3.0])}
    for objective, expected in (("clip", 0.0), ("cispo", -1.28)):
        loss, _ = surrogates.policy_gradient(
            out, torch.ones(1), **streams, objective=objective, clip_high=0.28
        )
        (gradient,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
        assert gradient.item() == pytest.approx(expected)


@pytest.mark.parametrize("objective", ["clip", "cispo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_wildly_different_policies_give_finite_numbers(objective, ratio):
    logprobs = torch.tensor([-1.0, -400.0, -0.1]).requires_grad_()
    out = TokenOutputs(logprobs_N=logprobs, row_N=torch.tensor([0, 1, 2]), num_rows=3)
    loss, metrics = surrogates.policy_gradient(
        out, torch.ones(3), advantages=torch.tensor([-1.0, 1.0, -2.0]), objective=objective, ratio=ratio, is_cap=2.0,
        old_logprobs=torch.tensor([-300.0, -1.0, -200.0]), sampler_logprobs=torch.tensor([-1.0, -300.0, -2.0]),
    )  # fmt: skip
    assert torch.autograd.grad(loss, logprobs)[0].isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


def test_the_overlong_penalty_is_the_papers():
    """arXiv:2503.14476, eq. 13, with L_max = 20 and L_cache = 8."""

    def eq_13(y):
        if y <= 20 - 8:
            return 0.0
        return ((20 - 8) - y) / 8 if y < 20 else -1.0

    lengths = torch.arange(21).view(3, 7)
    found = soft_penalty(lengths, longest=20, buffer=8).flatten().tolist()
    assert found == pytest.approx([eq_13(y) for y in range(21)])
    assert found[20] == -1.0
    assert found[16] == -0.5
