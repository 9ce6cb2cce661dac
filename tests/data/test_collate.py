"""Packed batches say the same as rows taken one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kitae.data.collate import ROUND_TO, collate, empty_batch, with_stream
from kitae.types import Row


def make_row(ids, prompt, *, stream=None, weight=1.0):
    taught = len(ids) - prompt
    return Row(
        token_ids=ids,
        loss_mask=[False] * prompt + [True] * taught,
        prompt_length=prompt,
        weight=weight,
        streams={"advantages": [0.0] * prompt + [stream or 0.0] * taught} if stream is not None else {},
    )


def context_of(batch, position):
    """The tokens that a packed position may see, oldest first, itself last."""
    for s in batch.packing.segments:
        if s.start <= position < s.start + s.length:
            prefix = range(s.prefix_start, s.prefix_start + s.prefix_length)
            seen = [*prefix, *range(s.start, position + 1)]
            assert batch.positions_T[seen].tolist() == list(range(len(seen)))
            return batch.input_ids_T[seen].tolist()
    raise AssertionError(f"position {position} lies in no segment")


def predictions(batch):
    return [
        (r, tuple(context_of(batch, s)), t, w)
        for r, s, t, w in zip(
            batch.row_N.tolist(), batch.source_N.tolist(), batch.targets_N.tolist(), batch.weights_N.tolist(),
            strict=True,
        )
    ]  # fmt: skip


def slow_predictions(rows):
    return [
        (number, tuple(row.token_ids[:t]), row.token_ids[t], row.weight)
        for number, row in enumerate(rows)
        for t, taught in enumerate(row.loss_mask)
        if taught
    ]


groups = st.lists(
    st.tuples(
        st.lists(st.integers(1, 5), min_size=1, max_size=6),
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(groups=groups, share=st.booleans(), rows_per_forward=st.integers(1, 7))
def test_every_prediction_sees_exactly_its_own_row(groups, share, rows_per_forward):
    rows = [make_row(p + c, len(p), weight=i + 1.0) for i, (p, cs) in enumerate(groups) for c in cs]
    batches = collate(rows, rows_per_forward=rows_per_forward, share_prompts=share)
    assert sum(b.num_rows for b in batches) == len(rows)
    for i, batch in enumerate(batches):
        part = rows[i * rows_per_forward : (i + 1) * rows_per_forward]
        assert predictions(batch) == slow_predictions(part)
        assert batch.packing.num_tokens % ROUND_TO == 0
        assert len(batch.input_ids_T) == len(batch.positions_T) == batch.packing.num_tokens
        assert batch.rows == part


@settings(max_examples=100, deadline=None)
@given(groups=groups, share=st.booleans(), max_tokens=st.integers(1, 40))
def test_a_token_limit_cuts_passes_and_loses_nothing(groups, share, max_tokens):
    rows = [make_row(p + c, len(p)) for p, cs in groups for c in cs]
    batches = collate(rows, rows_per_forward=99, max_tokens=max_tokens, share_prompts=share)
    assert [row for batch in batches for row in batch.rows] == rows
    for batch in batches:
        assert batch.packing.num_real_tokens <= max_tokens or batch.num_rows == 1
        assert predictions(batch) == slow_predictions(batch.rows)
    for first, second in itertools.pairwise(batches):
        (together,) = collate([*first.rows, second.rows[0]], rows_per_forward=99, share_prompts=share)
        assert together.packing.num_real_tokens > max_tokens, "one more row would have fitted"


def test_a_shared_prompt_is_laid_once():
    rows = [make_row([1, 2, 3, c], 3) for c in range(4, 9)]
    (batch,) = collate(rows, rows_per_forward=8)
    assert batch.packing.num_real_tokens == 3 + 5
    assert batch.source_N.tolist() == [2] * 5
    (apart,) = collate(rows, rows_per_forward=8, share_prompts=False)
    assert apart.packing.num_real_tokens == 4 * 5


def test_streams_and_kept_ids_follow_their_tokens():
    rows = [
        Row(
            token_ids=[5, 6, 7],
            loss_mask=[False, True, True],
            streams={"x": [0.0, 1.0, 2.0]},
            kept_ids=[[], [6], [7, 8]],
        ),
        Row(token_ids=[5, 9], loss_mask=[False, True], streams={"x": [0.0, 3.0]}, kept_ids=[[], [9, 1]]),
    ]
    (batch,) = collate(rows, rows_per_forward=2, temperature=0.7)
    assert batch.streams["x"].tolist() == [1.0, 2.0, 3.0]
    assert batch.kept_ids_N == [[6], [7, 8], [9, 1]]
    assert batch.temperature == 0.7


def test_with_stream_puts_numbers_back_on_their_rows():
    rows = [
        make_row([1, 2, 3, 4], 2, stream=1.0),
        make_row([1, 2, 5], 2, stream=2.0),
        make_row([7, 8], 1, stream=3.0),
    ]
    batches = collate(rows, rows_per_forward=2)
    values = [b.targets_N.float() * 10 for b in batches]
    scored = with_stream(rows, "ref_logprobs", batches, values)
    assert [r.streams["ref_logprobs"] for r in scored] == [[0, 0, 30, 40], [0, 0, 50], [0, 80]]
    assert [r.streams["advantages"] for r in scored] == [r.streams["advantages"] for r in rows]


def test_the_empty_batch_weighs_nothing():
    batch = empty_batch()
    assert batch.weights_N.tolist() == [0.0]
    assert len(batch.input_ids_T) == ROUND_TO


def test_a_taught_first_token_is_refused():
    with pytest.raises(AssertionError, match="nothing before it"):
        collate([Row(token_ids=[1, 2], loss_mask=[True, True])], rows_per_forward=1)


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(AssertionError, match="lists of"):
        collate([Row(token_ids=[1, 2, 3], loss_mask=[False, True])], rows_per_forward=1)


def test_dtypes_are_those_the_model_and_the_losses_expect():
    (batch,) = collate([make_row([1, 2], 1, stream=1.0)], rows_per_forward=1)
    assert batch.input_ids_T.dtype == batch.source_N.dtype == batch.targets_N.dtype == torch.long
    assert batch.weights_N.dtype == batch.streams["advantages"].dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=6
    ),
    max_tokens=st.integers(1, 40),
    rows_per_forward=st.integers(1, 5),
)
def test_units_are_never_cut_apart(pairs, max_tokens, rows_per_forward):
    rows = []
    for number, (prompt, chosen, rejected) in enumerate(pairs):
        for length in (chosen, rejected):
            ids = [number + 1] * prompt + [9] * length
            mask = [False] * prompt + [True] * length
            rows.append(
                Row(token_ids=ids, loss_mask=mask, prompt_length=prompt, numbers={"pair": float(number)})
            )
    batches = collate(rows, rows_per_forward=rows_per_forward, max_tokens=max_tokens, rows_per_unit=2)
    assert [row for batch in batches for row in batch.rows] == rows
    for batch in batches:
        assert batch.rows_per_unit == 2 and len(batch.rows) % 2 == 0
        assert batch.numbers["pair"].view(-1, 2).diff().abs().sum() == 0
        assert len(batch.rows) <= max(rows_per_forward, 2)
        assert batch.packing.num_real_tokens <= max_tokens or len(batch.rows) == 2


def test_rows_that_are_no_whole_units_are_refused():
    with pytest.raises(AssertionError, match="whole units"):
        collate([make_row([1, 2], 1)], rows_per_forward=4, rows_per_unit=2)
