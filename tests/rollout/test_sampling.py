"""The sampler against the exact distribution and against transformers' own processors."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from kitae.config import SamplingSettings
from kitae.rollout.sampling import BLOCK, History, draw, inverse_cdf, truncate_


def logits(rows: int, size: int, *, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def cdf_by_hand(row: torch.Tensor, uniform: float) -> int:
    total = 0.0
    probabilities = row.double().softmax(0).tolist()
    for token, probability in enumerate(probabilities):
        total += probability
        if total > uniform:
            return token
    return max(i for i, p in enumerate(probabilities) if p > 0)


@pytest.mark.parametrize("size", [1, 5, BLOCK, BLOCK + 1, 1000])
def test_inverse_cdf_finds_the_token_a_running_sum_finds(size: int):
    rows = logits(200, size, seed=size)
    uniforms = [random.Random(i).random() for i in range(200)]
    found, _ = inverse_cdf(rows, torch.tensor(uniforms, dtype=torch.float64))
    assert found.tolist() == [cdf_by_hand(row, u) for row, u in zip(rows, uniforms, strict=True)]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float):
    allowed = {3, 300, 301, 700}
    row = torch.full((1, 1000), -torch.inf)
    row[0, list(allowed)] = 0.0
    token, logprob = inverse_cdf(row, torch.tensor([uniform], dtype=torch.float64))
    assert token.item() in allowed
    assert logprob.item() == pytest.approx(-math.log(4))


@pytest.mark.parametrize(
    "sampling", [SamplingSettings(temperature=0.7), SamplingSettings(top_p=0.8, top_k=40)]
)
def test_draws_follow_the_exact_distribution(sampling: SamplingSettings):
    count, row = 40_000, logits(1, 600, seed=1, spread=1.5)
    exact = row.double() / sampling.temperature
    truncate_(exact, sampling)
    expected = exact.softmax(1)[0] * count
    numbers = random.Random(0)
    observed = torch.zeros(600, dtype=torch.float64)
    for _ in range(count // 1000):
        drawn = draw(row.repeat(1000, 1), sampling=sampling, uniforms=[numbers.random() for _ in range(1000)])
        observed += torch.bincount(torch.tensor(drawn.token_ids), minlength=600)
    often = expected >= 5
    chi_square = ((observed - expected)[often] ** 2 / expected[often]).sum().item()
    freedom = int(often.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
    assert observed[expected == 0].sum() == 0


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.05, 5),
    st.one_of(st.just(0), st.integers(1, 400)),
    st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    st.integers(0, 1000),
)
def test_what_is_kept_equals_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
):
    rows = logits(3, 300, seed=seed)
    warpers = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(hf.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(hf.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(hf.MinPLogitsWarper(min_p))
    expected = warpers(torch.zeros(3, 0, dtype=torch.long), rows.clone())
    sampling = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = draw(rows.clone(), sampling=sampling, uniforms=[0.1, 0.5, 0.9])
    if drawn.kept_ids is None:
        assert (top_k, top_p, min_p) == (0, 1, 0)
    else:
        assert drawn.kept_ids == [(row > -torch.inf).nonzero()[:, 0].tolist() for row in expected]
    exact = expected.double().log_softmax(1)
    for row, (token, logprob) in enumerate(zip(drawn.token_ids, drawn.logprobs, strict=True)):
        assert logprob == pytest.approx(exact[row, token].item(), abs=2e-6)


def test_top_p_looks_further_while_its_first_candidates_do_not_suffice():
    flat = torch.zeros(2, 5000) + torch.arange(5000) * 1e-6
    drawn = draw(flat, sampling=SamplingSettings(top_p=0.9), uniforms=[0.5, 0.5])
    assert drawn.kept_ids is not None
    assert [len(kept) for kept in drawn.kept_ids] == pytest.approx([4500, 4500], abs=15)


def test_equally_likely_tokens_at_the_edge_are_kept_together():
    row = torch.tensor([[0.0, 1.0, 2.0, 1.0, 1.0]])
    assert draw(row.clone(), sampling=SamplingSettings(top_k=2), uniforms=[0.5]).kept_ids == [[1, 2, 3, 4]]
    assert draw(row.clone(), sampling=SamplingSettings(top_p=0.5), uniforms=[0.5]).kept_ids == [[1, 2, 3, 4]]


def test_greedy_takes_the_likeliest_and_reports_the_models_own_logprob():
    rows = logits(4, 50)
    sampling = SamplingSettings(temperature=0, top_p=0.5, top_k=3)
    drawn = draw(rows.clone(), sampling=sampling, uniforms=[0.9] * 4)
    assert drawn.token_ids == rows.argmax(1).tolist()
    assert drawn.logprobs == pytest.approx(rows.log_softmax(1).amax(1).tolist(), abs=1e-6)
    assert drawn.kept_ids is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 4), st.sampled_from([1.0, 0.7, 1.5])
)
def test_penalties_equal_transformers_processors(past: list[int], ngram_size: int, penalty: float):
    row = logits(1, 12, seed=len(past))
    processors = hf.LogitsProcessorList([hf.RepetitionPenaltyLogitsProcessor(penalty)])
    if ngram_size:
        processors.append(hf.NoRepeatNGramLogitsProcessor(ngram_size))
    expected = processors(torch.tensor([past]), row.clone())
    sampling = SamplingSettings(temperature=0, repetition_penalty=penalty, no_repeat_ngram_size=ngram_size)
    history = History(past[:1], ngram_size=ngram_size)
    for token in past[1:]:
        history.append(token)
    ours = row.clone()
    drawn = draw(ours, sampling=sampling, uniforms=[0.5], histories=[history])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert drawn.token_ids == [expected.argmax().item()]


def test_a_row_is_drawn_alike_alone_and_among_others():
    rows, uniforms = logits(40, 700), [random.Random(i).random() for i in range(40)]
    for sampling in (SamplingSettings(), SamplingSettings(top_p=0.9), SamplingSettings(top_k=7, min_p=0.05)):
        together = draw(rows.clone(), sampling=sampling, uniforms=uniforms)
        for i in range(0, 40, 7):
            alone = draw(rows[i : i + 1].clone(), sampling=sampling, uniforms=uniforms[i : i + 1])
            assert alone.token_ids[0] == together.token_ids[i]
            assert alone.logprobs[0] == pytest.approx(together.logprobs[i], abs=1e-6)
            if together.kept_ids is not None and alone.kept_ids is not None:
                assert alone.kept_ids[0] == together.kept_ids[i]
