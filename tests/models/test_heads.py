"""Chunked log-probs against one big softmax written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kitae.models.heads import chunked_logprobs, rows_per_chunk
from kitae.models.kept import Kept

N, H, V = 150, 12, 40
KEPT = [[] if n % 3 == 0 else sorted({n % V, (7 * n) % V, (n + 1) % V}) for n in range(N)]


def problem(*, bias: bool = False, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, requires_grad=True)
    weight = (torch.randn(V, H, generator=generator) / 3).requires_grad_()
    bias_V = torch.randn(V, generator=generator, requires_grad=True) if bias else None
    targets = torch.arange(N) % V
    coefficients = torch.randn(N, generator=generator)
    return hidden, weight, bias_V, targets, coefficients


def slow(hidden, weight, bias, targets, *, temperature=1.0, kept=None):
    """Log-probs and entropies, one prediction at a time, the softmax written out in float64."""
    logprobs, entropies = [], []
    hidden, weight, bias = (x if x is None else x.double() for x in (hidden, weight, bias))
    for n in range(len(hidden)):
        logits = (weight @ hidden[n] + (0 if bias is None else bias)) / temperature
        ids = list(kept[n]) if kept is not None and kept[n] else list(range(V))
        p = logits[ids].exp() / logits[ids].exp().sum()
        logprobs.append(p[ids.index(int(targets[n]))].log())
        entropies.append(-(p * p.log()).sum())
    return torch.stack(logprobs).float(), torch.stack(entropies).float()


def gradients(inputs):
    return [None if x is None else x.grad for x in inputs]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept_ids", [None, KEPT], ids=["all", "kept"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("foretold", [False, True], ids=["recomputed", "foretold"])
def test_log_probs_and_gradients_equal_a_softmax_written_out(bias, kept_ids, temperature, foretold):
    *inputs, targets, coefficients = problem(bias=bias)
    kept = None if kept_ids is None else Kept.of(kept_ids, targets)
    found, entropy = chunked_logprobs(
        *inputs,
        targets,
        temperature=temperature,
        kept=kept,
        with_entropy=True,
        coefficients_N=coefficients if foretold else None,
        budget_bytes=1,
    )
    (found * coefficients).sum().backward()
    got = gradients(inputs)

    *inputs, targets, coefficients = problem(bias=bias)
    expected, slow_entropy = slow(*inputs, targets, temperature=temperature, kept=kept_ids)
    (expected * coefficients).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, slow_entropy, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, gradients(inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_coefficients_that_do_not_arrive_are_noticed():
    *inputs, targets, coefficients = problem()
    found, _ = chunked_logprobs(*inputs, targets, coefficients_N=torch.ones(N))
    (found * coefficients).sum().backward()
    got = gradients(inputs)

    *inputs, targets, coefficients = problem()
    found, _ = chunked_logprobs(*inputs, targets)
    (found * coefficients).sum().backward()
    for a, b in zip(got[:2], gradients(inputs)[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kept_ids", [None, KEPT], ids=["all", "kept"])
@pytest.mark.parametrize("foretold", [False, True], ids=["recomputed", "foretold"])
def test_the_gradient_of_the_entropy_equals_a_softmax_written_out(kept_ids, foretold):
    def loss(logprobs, entropy):
        return logprobs.sum() + (entropy * torch.linspace(-1, 1, N)).sum()

    *inputs, targets, _ = problem()
    kept = None if kept_ids is None else Kept.of(kept_ids, targets)
    ahead = torch.ones(N) if foretold else None
    loss(
        *chunked_logprobs(
            *inputs, targets, kept=kept, temperature=0.7, with_entropy=True, coefficients_N=ahead
        )
    ).backward()
    got = gradients(inputs)
    *inputs, targets, _ = problem()
    loss(*slow(*inputs, targets, kept=kept_ids, temperature=0.7)).backward()
    for a, b in zip(got[:2], gradients(inputs)[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("foretold", [False, True])
def test_a_frozen_head_gets_no_gradient(foretold):
    hidden, weight, _, targets, coefficients = problem()
    weight.requires_grad_(False)
    found, _ = chunked_logprobs(
        hidden, weight, None, targets, coefficients_N=coefficients if foretold else None
    )
    (found * coefficients).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("foretold", [False, True])
def test_a_bfloat16_heads_gradient_is_summed_in_float32(foretold):
    hidden, weight, _, targets, coefficients = problem()
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    low[1].main_grad = torch.full((V, H), 3.0)
    ahead = coefficients if foretold else None
    found, _ = chunked_logprobs(*low, None, targets, coefficients_N=ahead, budget_bytes=1)
    (found * coefficients).sum().backward()
    assert low[1].grad is None
    exact = [x.detach().float().requires_grad_() for x in low]
    expected, _ = slow(*exact, None, targets)
    (expected * coefficients).sum().backward()
    error = (low[1].main_grad - 3.0 - exact[1].grad).norm() / exact[1].grad.norm()
    assert 1e-6 < error < 0.02


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 200), budget=st.integers(1, 1 << 20))
def test_chunks_of_any_size_give_the_same(rows, budget):
    hidden, weight, _, targets, _ = problem()
    with torch.no_grad():
        found, _ = chunked_logprobs(hidden[:rows], weight, None, targets[:rows], budget_bytes=budget)
        expected = (hidden[:rows] @ weight.t()).log_softmax(-1).gather(1, targets[:rows, None])[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_chunk_shapes_repeat_and_fit_the_budget():
    assert rows_per_chunk(5, 1000, 1 << 20) == 64
    assert rows_per_chunk(100_000, 8192, 12 << 20) == 256
    assert rows_per_chunk(100_000, 152_064, 12 << 20) == 128


def test_a_target_outside_its_kept_ids_is_our_mistake():
    with pytest.raises(AssertionError, match=r"outside their kept ids at \[1\]"):
        Kept.of([[1, 2], [3]], torch.tensor([2, 4]))


def test_temperature_and_kept_ids_reach_the_head_of_a_policy(policy_of):
    from dataclasses import replace

    from kitae.config import SeamSettings
    from tests.models.conftest import batch_of, random_row

    rows = []
    for row in (random_row(12), random_row(30)):
        kept = [sorted({t, 5, 9}) if i % 2 else [] for i, t in enumerate(row.token_ids)]
        rows.append(replace(row, kept_ids=kept))
    batch = batch_of(rows, temperature=0.7)
    with torch.no_grad():
        found = policy_of("qwen3")(batch, with_entropy=True)
        plain = policy_of("qwen3", seams=SeamSettings(head=False))(batch, with_entropy=True)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert found[1].max() < torch.tensor(112.0).log()
    assert policy_of("qwen3")(batch)[1] is None
