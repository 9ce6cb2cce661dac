"""FlexAttention over packed rows: its mask, and its values where it is interpreted, against the other path."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from kitae import backends
from kitae.config import SeamSettings
from kitae.models import attention, flex
from kitae.types import Packing
from tests.models.conftest import ALL_FAMILIES, batch_of, random_row
from tests.models.test_attention import packing_of, random_qkv

GROUPS = st.lists(
    st.tuples(st.sampled_from([0, 1, 5, 130, 260]), st.lists(st.integers(1, 150), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)
CPU = torch.device("cpu")


def visible(packing: Packing) -> torch.Tensor:
    """Who sees whom, pair by pair; padding sees itself."""
    seen = torch.eye(packing.num_tokens, dtype=torch.bool)
    for s in packing.segments:
        for i in range(s.start, s.start + s.length):
            seen[i, s.start : i + 1] = True
            seen[i, s.prefix_start : s.prefix_start + s.prefix_length] = True
    return seen


def by_blocks(packing: Packing) -> torch.Tensor:
    """The same as the block mask says it: whole blocks as they are listed, the others pair by pair."""
    mask = flex.block_mask(packing, CPU)
    size = packing.num_tokens
    queries, keys = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pairs = mask.mask_mod(None, None, queries, keys)
    seen = torch.zeros(size, size, dtype=torch.bool)
    for counts, which, is_whole in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for row in range(counts.shape[-1]):
            for column in which[0, 0, row, : counts[0, 0, row]].tolist():
                block = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
                assert not seen[block].any(), "a block is listed twice"
                seen[block] = True if is_whole else pairs[block]
    return seen


@settings(max_examples=25, deadline=None)
@given(groups=GROUPS, padding=st.integers(0, 200))
def test_the_blocks_hold_the_visible_pairs_and_no_others(groups, padding):
    packing = packing_of(groups, padding=padding)
    assert torch.equal(by_blocks(packing), visible(packing))


def test_most_blocks_of_long_rows_are_whole_and_those_of_other_rows_absent():
    mask = flex.block_mask(packing_of([(0, [1024, 1024])], padding=0), CPU)
    assert mask.full_kv_num_blocks.sum() == 2 * sum(range(8)) and mask.kv_num_blocks.sum() == 16


@settings(max_examples=10, deadline=None)
@given(
    groups=GROUPS,
    value_size=st.sampled_from([8, 5]),
    kv_heads=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_its_values_are_those_of_padded_rows(groups, value_size, kv_heads, dtype):
    packing = packing_of(groups)
    inputs = random_qkv(packing.num_tokens, value_size=value_size, kv_heads=kv_heads)
    inputs = [x.detach().to(dtype) for x in inputs]
    real = packing.num_real_tokens
    out = flex.attend(*inputs, packing, scaling=0.3, is_compiled=False)
    expected = attention.attend(*inputs, packing, scaling=0.3)
    assert out.dtype == dtype and out.isfinite().all()
    torch.testing.assert_close(out[:real], expected[:real], rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(groups=GROUPS)
def test_a_softmax_over_its_mask_has_the_gradients_of_padded_rows(groups):
    packing = packing_of(groups)
    inputs = random_qkv(packing.num_tokens, kv_heads=4)
    weight = torch.randn(packing.num_tokens, 4, 8)
    weight[packing.num_real_tokens :] = 0

    def gradients(out):
        return torch.autograd.grad((out * weight).sum(), inputs)

    heads = [x.transpose(0, 1) for x in inputs]
    dense = F.scaled_dot_product_attention(*heads, attn_mask=by_blocks(packing), scale=0.3)
    found = gradients(dense.transpose(0, 1))
    for ours, theirs in zip(found, gradients(attention.attend(*inputs, packing, scaling=0.3)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dropout_goes_the_other_way():
    packing = packing_of([(0, [40, 3])])
    inputs = random_qkv(packing.num_tokens)
    torch.manual_seed(0)
    found = flex.attend(*inputs, packing, dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(found, attention.attend(*inputs, packing, dropout=0.5))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_heads_are_as_attention_gets_them(family, policy_of, monkeypatch):
    policy = policy_of(family, seams=SeamSettings(kernels=False))
    seen = []

    def attend(q, k, v, packing, **how):
        seen.append((q.shape[1], k.shape[1], q.shape[2], v.shape[2]))
        assert k.shape[2] == q.shape[2] and v.shape[1] == k.shape[1]
        return attention.attend(q, k, v, packing, **how)

    monkeypatch.setattr(flex, "attend", attend)
    monkeypatch.setattr(flex, "why_not", lambda *_, **__: None)
    batch = batch_of([random_row(30), random_row(12)])
    before = policy(batch).logprobs_N
    flex.install(policy.causal_lm, device=CPU, dtype=torch.float32)
    assert torch.equal(policy(batch).logprobs_N, before)
    assert set(seen) == {attention.head_sizes(policy.config)} and len(seen) == policy.config.num_hidden_layers


class TestATrialDecides:
    @pytest.fixture
    def try_with(self, policy_of, monkeypatch, caplog):
        caplog.set_level(logging.INFO)

        def attempt(attend):
            monkeypatch.setattr(flex, "attend", attend)
            model = policy_of("qwen3").causal_lm
            flex.install(model, device=CPU, dtype=torch.float32)
            return model.config._attn_implementation, caplog.messages[-1]

        return attempt

    def test_it_is_used_where_it_gives_the_same(self, try_with):
        used, told = try_with(attention.attend)
        assert used == flex.NAME and "it gives what padded rows give" in told

    def test_not_where_its_values_differ(self, try_with):
        used, told = try_with(lambda *given: attention.attend(*given) * 1.01)
        assert used != flex.NAME and "other numbers here: 1.0e-02 off" in told

    def test_not_where_only_its_gradients_differ(self, try_with):
        def attend(q, k, v, packing):
            k = k * 1.01 - (k * 0.01).detach()
            return attention.attend(q, k, v, packing)

        used, told = try_with(attend)
        assert used != flex.NAME and "other numbers" in told

    def test_not_where_it_fails_as_the_interpreted_backward_of_a_cpu_does(self, try_with, monkeypatch):
        monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
        used, told = try_with(flex.attend)
        assert (
            used != flex.NAME and "does not run here: FlexAttention does not support backward on CPU" in told
        )

    def test_a_cpu_is_not_tried(self):
        assert backends.of(CPU).supports("flex_attention") == (False, "it has no backward pass on CPUs")
