"""The training kernels against the torch formulas they stand for: values and gradients, odd sizes, both dtypes."""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.nn.functional as F

from kitae import compiler
from kitae.config import SeamSettings
from kitae.errors import ModelError
from kitae.models import attention, native, native_head
from kitae.models.heads import plain_logprobs
from kitae.types import Packing, Segment
from tests.models.conftest import batch_of, random_row


@pytest.fixture(autouse=True)
def compiled():
    if native.library() is None:
        if os.environ.get("CI") == "true":
            pytest.fail("the kernels must compile in CI")
        pytest.skip("no kernels on this machine")


def rows_of(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equal_with_gradients(fast, slow, *inputs, dtype=torch.float32, bfloat16=2**-7) -> None:
    """Values and input gradients against the float32 formula's, relative to the largest."""
    tolerance = 5e-6 if dtype == torch.float32 else bfloat16
    ours = [x.to(dtype).requires_grad_() for x in inputs]
    theirs = [x.to(dtype).float().requires_grad_() for x in inputs]
    found, expected = fast(*ours), slow(*theirs)
    weights = rows_of(*expected.shape, seed=99).to(dtype)
    (found * weights).sum().backward()
    (expected * weights.float()).sum().backward()
    assert found.dtype == dtype
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    for a, b in pairs:
        assert (a.float() - b).abs().max() <= tolerance * b.abs().max()


both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@both
@pytest.mark.parametrize("size", [1, 5, 16, 48, 250])
def test_norm(size, dtype):
    assert_equal_with_gradients(
        lambda x, w: native.rms_norm(x, w, 1e-6),
        lambda x, w: F.rms_norm(x, (size,), w, 1e-6),
        rows_of(3, 13, size),
        rows_of(size, seed=1),
        dtype=dtype,
    )


def rotated(x_TQD, weight, cos, sin):
    """As transformers writes it."""
    if weight is not None:
        x_TQD = F.rms_norm(x_TQD, weight.shape, weight, 1e-6)
    half = x_TQD.shape[-1] // 2
    turned = torch.cat((-x_TQD[..., half:], x_TQD[..., :half]), -1)
    return x_TQD * cos[:, None] + turned * sin[:, None]


@both
@pytest.mark.parametrize("size", [2, 16, 24, 64])
def test_rotary_with_and_without_norm(size, dtype):
    cos, sin = (rows_of(21, size, seed=s).to(dtype) for s in (2, 3))
    x, weight = rows_of(21, 3, size), rows_of(size, seed=1)
    assert_equal_with_gradients(
        lambda x, w: native.rotary(x, w, cos, sin, 1e-6),
        lambda x, w: rotated(x, w, cos.float(), sin.float()),
        x,
        weight,
        dtype=dtype,
    )
    assert_equal_with_gradients(
        lambda x: native.rotary(x, None, cos, sin, 0.0),
        lambda x: rotated(x, None, cos.float(), sin.float()),
        x,
        dtype=dtype,
    )


@both
@pytest.mark.parametrize("size", [1, 31, 5000])
def test_swiglu(size, dtype):
    gate, up = rows_of(3, size) * 4, rows_of(3, size, seed=1)
    assert_equal_with_gradients(native.swiglu, lambda g, u: F.silu(g) * u, gate, up, dtype=dtype)


@both
def test_add_to_float32_is_torchs(dtype):
    total, x = rows_of(7, 700), rows_of(7, 700, seed=1).to(dtype)
    expected = total + x
    native.add_(total, x)
    assert torch.equal(total, expected)
    native.add_(total, x.t().contiguous().t())  # other strides
    assert torch.equal(total, expected + x)


SEGMENTS = [
    Segment(0, 37), Segment(37, 1), Segment(38, 5), Segment(43, 7, 38, 5), Segment(50, 70, 38, 5),
    Segment(120, 4, 38, 5), Segment(124, 33), Segment(157, 64),
]  # fmt: skip


def row_by_row(q, k, v, packing, *, scaling):
    """Each segment's attention by itself, written out."""
    out = torch.zeros(packing.num_tokens, q.shape[1], v.shape[2])
    for s in packing.segments:
        seen = [*range(s.prefix_start, s.prefix_start + s.prefix_length), *range(s.start, s.start + s.length)]
        own = slice(s.start, s.start + s.length)
        keys, values = (x[seen].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("tqd,sqd->qts", q[own], keys) * scaling
        hidden = torch.ones(s.length, len(seen), dtype=torch.bool).triu(s.prefix_length + 1)
        out[own] = torch.einsum("qts,sqd->tqd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
    return out


@both
@pytest.mark.parametrize(("size", "value_size"), [(16, 16), (24, 16), (5, 7), (64, 64)])
def test_attention_over_packed_rows_and_shared_prompts(size, value_size, dtype):
    packing = Packing(segments=SEGMENTS, num_tokens=256)
    assert_equal_with_gradients(
        lambda q, k, v: attention.attend(q, k, v, packing, scaling=0.3, kernels=True),
        lambda q, k, v: row_by_row(q, k, v, packing, scaling=0.3),
        rows_of(256, 4, size),
        rows_of(256, 2, size, seed=1),
        rows_of(256, 2, value_size, seed=2),
        dtype=dtype,
    )


@both
def test_attention_over_many_blocks_of_queries_and_keys(dtype):
    lengths = [Segment(0, 300), Segment(300, 31, 0, 290), Segment(331, 270, 0, 290), Segment(601, 513)]
    packing = Packing(segments=lengths, num_tokens=1152)
    assert_equal_with_gradients(
        lambda q, k, v: attention.attend(q, k, v, packing, scaling=0.2, kernels=True)[:1114],
        lambda q, k, v: row_by_row(q, k, v, packing, scaling=0.2)[:1114],
        *(rows_of(1152, heads, 16, seed=seed) for seed, heads in enumerate((2, 1, 1))),
        dtype=dtype,
    )


def test_attention_reads_heads_where_they_lie():
    packing = Packing(segments=SEGMENTS, num_tokens=256)
    # Queries, keys and values of a head side by side, as latent attention has them.
    together = rows_of(256, 2, 40)

    def attended(x):
        return attention.attend(*x.split((16, 16, 8), -1), packing, scaling=0.3, kernels=True)

    assert_equal_with_gradients(
        attended, lambda x: row_by_row(*x.split((16, 16, 8), -1), packing, scaling=0.3), together
    )


def test_padding_gives_no_gradient_whatever_memory_held():
    packing = Packing(segments=[Segment(0, 20)], num_tokens=64)
    q, k, v = (rows_of(64, 2, 16, seed=s).requires_grad_() for s in range(3))
    attention.attend(q, k, v, packing, scaling=0.3, kernels=True).sum().backward()
    assert all((x.grad[20:] == 0).all() and x.grad[:20].abs().sum() > 0 for x in (q, k, v))


def test_attention_takes_its_kernel_only_where_a_prefix_begins_a_segment():
    inside = Packing(segments=[Segment(0, 9), Segment(9, 4, 2, 5)], num_tokens=16)
    assert attention.runs_of(inside) is None
    chained = Packing(segments=[Segment(0, 9), Segment(9, 4, 0, 9), Segment(13, 3, 9, 4)], num_tokens=16)
    assert attention.runs_of(chained) is None  # two groups would add to the same keys at once
    q, k, v = (rows_of(16, 2, 8, seed=s) for s in range(3))
    found = attention.attend(q, k, v, inside, scaling=0.3, kernels=True)[:13]
    torch.testing.assert_close(found, row_by_row(q, k, v, inside, scaling=0.3)[:13])


@both
@pytest.mark.parametrize("foretold", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_head_in_chunks(dtype, foretold, with_bias, monkeypatch):
    monkeypatch.setattr(native_head, "MIN_ROWS", 128)
    monkeypatch.setattr(native_head, "SLICE_BYTES", 24 * 4 * 50)
    hidden, weight, bias = rows_of(300, 24), rows_of(203, 24, seed=1), rows_of(203, seed=2)
    targets = torch.randint(0, 203, (300,), generator=torch.Generator().manual_seed(3))
    coefficients = rows_of(300, seed=99)  # what assert_equal_with_gradients sends back
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]

    def fast(h, w, b=None):
        given = coefficients.to(dtype).float() if foretold else None
        logprobs, _ = native_head.chunked_logprobs(
            h, w, b, targets, temperature=0.7, coefficients_N=given, budget_bytes=1
        )
        return logprobs.to(dtype)

    def slow(h, w, b=None):
        return plain_logprobs(F.linear(h, w, b), targets, temperature=0.7)[0]

    # The product with the weights rounds the logits themselves.
    assert_equal_with_gradients(fast, slow, *inputs, dtype=dtype, bfloat16=2**-6)


@both
@pytest.mark.parametrize("arrives", ["what was foretold", "something else", "an entropy's gradient too"])
def test_main_grad_gets_the_head_s_gradient_whatever_was_foretold(dtype, arrives):
    hidden, weight = (x.to(dtype) for x in (rows_of(300, 24), rows_of(203, 24, seed=1)))
    targets = torch.randint(0, 203, (300,), generator=torch.Generator().manual_seed(3))
    foretold = rows_of(300, seed=4)
    real = foretold if arrives != "something else" else rows_of(300, seed=5)

    def loss(logprobs, entropy):
        return (logprobs * real).sum() + (0.5 * entropy.sum() if "entropy" in arrives else 0)

    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    ours[1].main_grad = torch.full((203, 24), 3.0)
    loss(
        *native_head.chunked_logprobs(*ours, None, targets, coefficients_N=foretold, budget_bytes=1)
    ).backward()
    theirs = [x.float().requires_grad_() for x in (hidden, weight)]
    loss(*plain_logprobs(F.linear(*theirs), targets)).backward()

    assert ours[1].grad is None
    tolerance = 2e-5 if dtype == torch.float32 else 2**-6
    for found, expected in ((ours[0].grad, theirs[0].grad), (ours[1].main_grad - 3, theirs[1].grad)):
        assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()


def test_main_grad_stays_as_it_is_where_no_backward_comes():
    hidden, weight = rows_of(30, 24), rows_of(50, 24, seed=1).requires_grad_()
    weight.main_grad = torch.zeros(50, 24)
    targets = torch.arange(30)
    with torch.no_grad():
        native_head.chunked_logprobs(hidden, weight, None, targets, coefficients_N=rows_of(30, seed=2))
    assert not weight.main_grad.any()


@pytest.mark.parametrize("wrong", [-1, 50])
def test_a_target_that_the_head_has_not_is_refused(wrong):
    hidden, weight = rows_of(3, 8), rows_of(50, 8)
    with pytest.raises(ModelError, match=f"token id {wrong} is none of the model's 50"):
        native_head.chunked_logprobs(hidden, weight, None, torch.tensor([4, wrong, 49]))


def test_chunks_of_the_head_are_alike_and_fit_the_budget():
    rows = functools.partial(native_head._rows_per_chunk, bytes_each=2, budget_bytes=4 << 20)
    assert rows(1, 8192) == 32
    assert rows(1100, 8192) == 224
    assert rows(1139, 151_936) == 192


def test_entropy_and_its_gradient():
    targets = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(3))

    def both_outputs(said):
        return torch.stack(said, 1)

    assert_equal_with_gradients(
        lambda h, w: both_outputs(native_head.chunked_logprobs(h, w, None, targets, temperature=1.3)),
        lambda h, w: both_outputs(plain_logprobs(h @ w.t(), targets, temperature=1.3)),
        rows_of(40, 24),
        rows_of(50, 24, seed=1),
    )


def test_bits_do_not_depend_on_threads(policy_of):
    batch = batch_of([random_row(n) for n in (37, 2, 130, 64)])
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x, weight = rows_of(100, 48).requires_grad_(), rows_of(48, seed=1).requires_grad_()
            q, k, v = (rows_of(batch.packing.num_tokens, 2, 16, seed=s).requires_grad_() for s in range(3))
            out = attention.attend(q, k, v, batch.packing, scaling=0.25, kernels=True)
            (native.rms_norm(x, weight, 1e-6).square().sum() + out.square().sum()).backward()
            found.append([out.detach(), *(p.grad for p in (x, weight, q, k, v))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_a_compiler_torch_computes_and_the_log_says_so(policy_of, monkeypatch, caplog):
    caplog.set_level("INFO", logger="kitae")
    rows = [random_row(n) for n in (20, 3)]
    with torch.no_grad():
        expected, *_ = policy_of("qwen3")(batch_of(rows))

    def refuse(*_):
        raise compiler.BuildError("there is no C++ compiler")

    monkeypatch.setattr(native, "load_library", refuse)
    native.library.cache_clear()
    try:
        policy = policy_of("qwen3")
        assert not policy.seams.kernels
        assert "torch's own operations instead of kernels: there is no C++ compiler" in caplog.text
        with torch.no_grad():
            found, *_ = policy(batch_of(rows))
    finally:
        native.library.cache_clear()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


EXPERTS = ("grouped_product", "grouped_outer", "gated", "gated_backward", "sum_slots")


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "deepseek_v3"])
def test_the_kernels_really_run(family, policy_of, monkeypatch):
    called: set[str] = set()
    call = native._call
    monkeypatch.setattr(native, "_call", lambda name, *a: (called.add(name), call(name, *a)))
    policy = policy_of(family)
    assert policy.seams == SeamSettings(flex=False)
    logprobs, *_ = policy(batch_of([random_row(20)]))
    logprobs.sum().backward()
    expected = native.ARGUMENTS.keys() - {"kitae_add", "kitae_adamw"}  # of bfloat16 gradients, of updates
    if family == "deepseek_v3":  # rotates part of a head, interleaved
        expected -= {"kitae_rotary", "kitae_rotary_backward"}
    else:
        expected -= {f"kitae_{name}" for name in EXPERTS}
    assert expected <= called
