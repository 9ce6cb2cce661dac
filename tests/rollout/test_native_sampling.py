"""The sampler of the native kernels against the one in plain torch: the same tokens, log-probabilities and kept ids."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kitae.config import SamplingSettings
from kitae.rollout import native, structs
from kitae.rollout.base import Request, make_requests
from kitae.rollout.sampling import Draw, draw
from kitae.types import Problem

NOTHING = torch.empty(0, dtype=torch.int64)


def requests_of(sampling: SamplingSettings, count: int) -> list[Request]:
    problem = Problem(prompt="", token_ids=[1], index=0)
    return make_requests(problem, [1] * count, number=0, sampling=sampling, seed=3)


def draw_by_kernel(kernels: ctypes.CDLL, logits_BV: Tensor, requests: list[Request]) -> Draw:
    """One token for each request from its row of logits."""
    kernels = structs.declare(kernels)
    vocabulary = logits_BV.shape[1]
    padded_BV = torch.full((len(logits_BV), -(-vocabulary // 64) * 64), 1e9)  # padding is never to be chosen
    padded_BV[:, :vocabulary] = logits_BV
    model = structs.Model(vocabulary=vocabulary)
    scratch = structs.Scratch(logits=structs.pointer(padded_BV), logits_stride=padded_BV.shape[1])
    buffers = native._SamplingBuffers(requests, steps=1, stop_ids=NOTHING, vocabulary=vocabulary)
    row_of_B = torch.arange(len(requests), dtype=torch.int32)
    kernels.kitae_sample(model, scratch, structs.pointer(row_of_B), len(requests), buffers.struct)
    kept = [
        buffers.kept_ids(0, row) if native.lists_kept_ids(request) else None
        for row, request in enumerate(requests)
    ]
    return Draw(buffers.ids[0].tolist(), buffers.logprobs[0].tolist(), kept)


def draw_slowly(logits_BV: Tensor, requests: list[Request]) -> Draw:
    return draw(
        logits_BV.clone(),
        sampling=requests[0].sampling,
        uniforms=[request.uniforms.peek(1)[0] for request in requests],
    )


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    temperature=st.floats(0.05, 5),
    top_k=st.one_of(st.just(0), st.integers(1, 1200)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    vocabulary=st.sampled_from([1, 3, 16, 255, 257, 1000]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    is_coarse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_truncation_is_that_of_the_plain_sampler(
    kernels: ctypes.CDLL,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    vocabulary: int,
    spread: float,
    is_coarse: bool,
    seed: int,
):
    numbers = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(4, vocabulary, generator=numbers) * spread
    if is_coarse:
        logits_BV = logits_BV.bfloat16().float()  # equal ones among them
    sampling = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    requests = requests_of(sampling, 4)
    ours, theirs = draw_by_kernel(kernels, logits_BV, requests), draw_slowly(logits_BV, requests)
    assert ours.kept_ids == (theirs.kept_ids or [None] * 4)
    assert ours.token_ids == theirs.token_ids
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_a_large_vocabulary_and_settings_of_each_row(kernels: ctypes.CDLL):
    numbers = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(7, 151_936, generator=numbers) * 2
    each = [
        SamplingSettings(temperature=0.6, top_p=0.95),
        SamplingSettings(temperature=0.7, top_k=20, top_p=0.8),
        SamplingSettings(temperature=1.2, min_p=0.05),
        SamplingSettings(),
        SamplingSettings(temperature=0, top_p=0.5),
        SamplingSettings(temperature=0.9, top_k=100),
        SamplingSettings(temperature=0.9, top_k=10**30, top_p=0.5),
    ]
    requests = [requests_of(sampling, 1)[0] for sampling in each]
    requests[2].wants_kept_ids = False
    ours = draw_by_kernel(kernels, logits_BV, requests)
    for row, request in enumerate(requests):
        theirs = draw_slowly(logits_BV[row : row + 1], [request])
        assert ours.token_ids[row] == theirs.token_ids[0]
        assert ours.logprobs[row] == pytest.approx(theirs.logprobs[0], abs=1e-5)
        expected = None if theirs.kept_ids is None or row == 2 else theirs.kept_ids[0]
        assert ours.kept_ids is not None and ours.kept_ids[row] == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_give_a_log_probability_that_is_not(kernels: ctypes.CDLL, value: float):
    for place in (0, 15, 99):
        logits_BV = torch.zeros(1, 100)
        logits_BV[0, place] = value
        drawn = draw_by_kernel(kernels, logits_BV, requests_of(SamplingSettings(top_p=0.9), 1))
        assert not math.isfinite(drawn.logprobs[0])


def test_top_p_that_float32_takes_for_one_still_lists_what_it_keeps(kernels: ctypes.CDLL):
    requests = requests_of(SamplingSettings(top_p=1 - 1e-12), 4)
    found = draw_by_kernel(kernels, torch.randn(4, 50), requests)
    assert all(token in (kept or ()) for token, kept in zip(found.token_ids, found.kept_ids, strict=True))
