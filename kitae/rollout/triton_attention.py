"""One-token attention over pages, in Triton: what page_cache.attend_slowly computes, without gathering anything.

    row, key-value head, part of its tokens --online softmax--> sum, weights' total, largest score
    row, query head --all parts--> attention

As FlashAttention's decoding splits long rows over the whole device (https://pytorch.org/blog/flash-decoding/); query heads
that share a key-value head are the rows of one product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kitae.rollout.pages import PAGE

BLOCK = 64
"""Tokens of one product."""
PART = 256
"""Tokens of a part, where rows are short."""
MOST_PARTS = 32
LEAST_ROWS = 16
"""The fewest rows of a product of Triton's."""


def attend(
    q_BQD: Tensor, keys: Tensor, values: Tensor, tables_BP: Tensor, positions_B: Tensor, scaling: float
) -> Tensor:
    """See page_cache.attend_slowly."""
    with torch.accelerator.device_index(q_BQD.device.index):  # Triton launches on the present device
        return _attend(q_BQD, keys, values, tables_BP, positions_B, scaling)


def _attend(
    q_BQD: Tensor, keys: Tensor, values: Tensor, tables_BP: Tensor, positions_B: Tensor, scaling: float
) -> Tensor:
    num_rows, query_heads, size = q_BQD.shape
    heads, value_size = values.shape[2:]
    most_tokens = tables_BP.shape[1] * PAGE
    part = max(PART, triton.next_power_of_2(-(-most_tokens // MOST_PARTS)))
    num_parts = -(-most_tokens // part)
    float32 = {"device": q_BQD.device, "dtype": torch.float32}
    sums = torch.empty(num_rows, query_heads, num_parts, value_size, **float32)
    totals, largest = (torch.empty(num_rows, query_heads, num_parts, **float32) for _ in range(2))
    group = query_heads // heads
    q_BQD = q_BQD.contiguous()
    _attend_part[(num_rows, heads, num_parts)](
        q_BQD, keys, values, tables_BP, positions_B, sums, totals, largest, scaling,
        tables_BP.stride(0), num_parts,
        HEADS=heads, GROUP=group, ROWS=max(LEAST_ROWS, triton.next_power_of_2(group)),
        SIZE=size, PADDED=max(LEAST_ROWS, triton.next_power_of_2(size)),
        VALUE_SIZE=value_size, VALUE_PADDED=max(LEAST_ROWS, triton.next_power_of_2(value_size)),
        PAGE_SIZE=PAGE, BLOCK=BLOCK, PART=part,
    )  # fmt: skip
    out = torch.empty(num_rows, query_heads, value_size, device=q_BQD.device, dtype=q_BQD.dtype)
    _join_parts[(num_rows, query_heads)](
        sums, totals, largest, positions_B, out, num_parts,
        QUERY_HEADS=query_heads, VALUE_SIZE=value_size, VALUE_PADDED=triton.next_power_of_2(value_size), PART=part,
    )  # fmt: skip
    return out


@triton.jit
def _attend_part(
    q_ptr, keys_ptr, values_ptr, tables_ptr, positions_ptr, sums_ptr, totals_ptr, largest_ptr, scaling,
    table_stride, num_parts,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One part of one row for the query heads of one key-value head; parts behind the row's end do nothing."""
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions_ptr + row) + 1
    first = part * PART
    if first < length:
        g = tl.arange(0, ROWS)
        d = tl.arange(0, PADDED)
        e = tl.arange(0, VALUE_PADDED)
        query_head = row * HEADS * GROUP + head * GROUP + g
        is_query = g < GROUP
        q = tl.load(
            q_ptr + query_head[:, None] * SIZE + d[None, :],
            mask=is_query[:, None] & (d < SIZE)[None, :],
            other=0.0,
        )
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
        last = tl.minimum(first + PART, length)
        for start in range(first, last, BLOCK):
            t = start + tl.arange(0, BLOCK)
            is_token = t < length
            page = tl.load(tables_ptr + row * table_stride + t // PAGE_SIZE, mask=is_token, other=0)
            place = (page.to(tl.int64) * PAGE_SIZE + t % PAGE_SIZE) * HEADS + head
            k = tl.load(
                keys_ptr + place[None, :] * SIZE + d[:, None],
                mask=is_token[None, :] & (d < SIZE)[:, None],
                other=0.0,
            )
            scores = tl.dot(q, k, input_precision="ieee") * scaling
            scores = tl.where(is_token[None, :], scores, float("-inf"))
            new_most = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp(scores - new_most[:, None])
            shrink = tl.exp(most - new_most)
            total = total * shrink + tl.sum(weights, 1)
            v = tl.load(
                values_ptr + place[:, None] * VALUE_SIZE + e[None, :],
                mask=is_token[:, None] & (e < VALUE_SIZE)[None, :],
                other=0.0,
            )
            sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            most = new_most
        at = query_head * num_parts + part
        tl.store(
            sums_ptr + at[:, None] * VALUE_SIZE + e[None, :],
            sums,
            mask=is_query[:, None] & (e < VALUE_SIZE)[None, :],
        )
        tl.store(totals_ptr + at, total, mask=is_query)
        tl.store(largest_ptr + at, most, mask=is_query)


@triton.jit
def _join_parts(
    sums_ptr, totals_ptr, largest_ptr, positions_ptr, out_ptr, num_parts,
    QUERY_HEADS: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PADDED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The attention of one query head of one row from the parts that have tokens."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(positions_ptr + row) + 1
    e = tl.arange(0, VALUE_PADDED)
    at = (row * QUERY_HEADS + head) * num_parts
    most = tl.load(largest_ptr + at)
    total = tl.load(totals_ptr + at)
    sums = tl.load(sums_ptr + at * VALUE_SIZE + e, mask=e < VALUE_SIZE, other=0.0)
    for part in range(1, tl.cdiv(length, PART)):
        other = tl.load(largest_ptr + at + part)
        new_most = tl.maximum(most, other)
        mine, theirs = tl.exp(most - new_most), tl.exp(other - new_most)
        total = total * mine + tl.load(totals_ptr + at + part) * theirs
        more = tl.load(sums_ptr + (at + part) * VALUE_SIZE + e, mask=e < VALUE_SIZE, other=0.0)
        sums = sums * mine + more * theirs
        most = new_most
    tl.store(out_ptr + (row * QUERY_HEADS + head) * VALUE_SIZE + e, sums / total, mask=e < VALUE_SIZE)
