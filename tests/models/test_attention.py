"""Packed attention against every token's own softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kitae.models.attention import attend, cut, plan_of
from kitae.types import Packing, Segment


def packing_of(groups, *, padding: int = 3) -> Packing:
    """Groups (prompt length, completion lengths); no prompt: rows by themselves."""
    segments, at = [], 0
    for prompt, lengths in groups:
        start = at
        if prompt:
            segments.append(Segment(at, prompt))
            at += prompt
        for length in lengths:
            segments.append(Segment(at, length, start if prompt else 0, prompt))
            at += length
    return Packing(segments=segments, num_tokens=at + padding)


def slow(q, k, v, packing, scaling):
    out = []
    for s in packing.segments:
        for i in range(s.length):
            seen = [
                *range(s.prefix_start, s.prefix_start + s.prefix_length),
                *range(s.start, s.start + i + 1),
            ]
            keys = k[seen].repeat_interleave(q.shape[1] // k.shape[1], 1)
            values = v[seen].repeat_interleave(q.shape[1] // k.shape[1], 1)
            weights = torch.einsum("hd,khd->hk", q[s.start + i], keys).mul(scaling).softmax(-1)
            out.append(torch.einsum("hk,khd->hd", weights, values))
    return torch.stack(out)


def random_qkv(tokens, *, heads=4, kv_heads=2, size=8, value_size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    shapes = (heads, size), (kv_heads, size), (kv_heads, value_size)
    return [torch.randn(tokens, *s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@settings(max_examples=20, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.sampled_from([0, 1, 5, 40]), st.lists(st.integers(1, 45), min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    ),
    value_size=st.sampled_from([8, 5]),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_every_token_attends_to_its_prefix_and_its_own_past(groups, value_size, kv_heads):
    packing = packing_of(groups)
    real = packing.num_real_tokens
    inputs = random_qkv(packing.num_tokens, value_size=value_size, kv_heads=kv_heads)
    out = attend(*inputs, packing, scaling=0.3)
    weight = torch.randn(real, 4, value_size, generator=torch.Generator().manual_seed(1))
    (out[:real] * weight).sum().backward()
    found = [x.grad.clone() for x in inputs]

    for x in inputs:
        x.grad = None
    expected = slow(*inputs, packing, 0.3)
    (expected * weight).sum().backward()
    torch.testing.assert_close(out[:real], expected, rtol=1e-4, atol=1e-5)
    for a, x in zip(found, inputs, strict=True):
        torch.testing.assert_close(a, x.grad, rtol=1e-4, atol=1e-5)
    assert out.isfinite().all()


def test_gradient_flowing_into_padding_goes_nowhere():
    packing = packing_of([(0, [3, 2])], padding=4)
    inputs = random_qkv(9)
    attend(*inputs, packing, scaling=1.0)[5:].sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)


def test_half_precision_stays_half_and_close():
    packing = packing_of([(7, [30, 3]), (0, [20])])
    low = random_qkv(packing.num_tokens, dtype=torch.bfloat16)
    out = attend(*low, packing, scaling=0.3)
    assert out.dtype == torch.bfloat16
    expected = slow(*[x.float() for x in low], packing, 0.3)
    assert (out[: len(expected)].float() - expected).abs().max() < 0.02


def test_a_plan_is_made_once_per_device():
    packing = packing_of([(0, [3])])
    assert plan_of(packing, torch.device("cpu")) is plan_of(packing, torch.device("cpu"))


def cost(buckets) -> float:
    return sum(len(b) * max(s.length for s in b) ** 2 / 2 + 6000 for b in buckets)


def test_segments_are_cut_where_it_is_cheapest():
    segments = [Segment(0, n) for n in (512, 512, 480, 32, 32, 16, 16, 8)]
    found = cut(segments)
    assert [s for bucket in found for s in bucket] == segments
    ways = []
    for mask in range(2 ** (len(segments) - 1)):
        buckets, current = [], [segments[0]]
        for i, s in enumerate(segments[1:]):
            if mask >> i & 1:
                buckets.append(current)
                current = []
            current.append(s)
        ways.append(cost([*buckets, current]))
    assert cost(found) == pytest.approx(min(ways))


def test_long_runs_of_rows_are_cut_into_calls_of_bounded_size():
    assert [len(b) for b in cut([Segment(0, 4)] * 130)] in ([64, 64, 2], [2, 64, 64], [64, 2, 64])
