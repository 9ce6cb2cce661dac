"""Packed attention by torch's FlexAttention (arXiv:2412.05496), for devices whose compiler makes one kernel of it.

    packing --block_mask--> which blocks of 128 x 128 tokens see each other --flex_attention--> attention of every token

Neither padding nor the pairs of different rows are computed. Compiled it has a backward pass, and interpreted, as on a CPU,
a forward one only. `why_not` tries a device before the first pass, values and gradients, against attention.py.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kitae.models import attention, seams
from kitae.types import Packing, Segment

log = logging.getLogger(__name__)

NAME = "kitae_flex"
"""What it is called in transformers' registry of attention functions."""
BLOCK = 128
TRIED = Packing(
    segments=[Segment(0, 150), Segment(150, 1), Segment(151, 70, 0, 150), Segment(221, 9, 0, 150), Segment(230, 100)],
    num_tokens=384,
)  # fmt: skip
"""A packing with rows over several blocks, a one-token row, a shared prompt, and padding."""


def attend(
    q_TQD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    packing: Packing,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_compiled: bool = True,
) -> Tensor:
    """As attention.attend, which computes what has dropout; a padding token attends to itself, and nothing else to it."""
    if dropout:
        return attention.attend(q_TQD, k_TKD, v_TKD, packing, scaling=scaling, dropout=dropout)
    run: Any = compiled() if is_compiled else flex_attention  # torch types neither as it is called
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TQD, k_TKD, v_TKD))
    mask = block_mask(packing, q.device)
    out: Tensor = run(q, k, v, block_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@functools.cache
def compiled() -> Callable[..., Any]:
    """One kernel for all lengths (Any: torch.compile keeps no types)."""
    return torch.compile(flex_attention, dynamic=True)


def block_mask(packing: Packing, device: torch.device) -> BlockMask:
    """What each token of the packing sees, derived once and kept with the packing.

    Blocks are judged by the least and the greatest of their tokens' bounds, so that nothing of T x T is ever built.
    """
    key = ("flex", device)
    if key not in packing.plans:
        packing.plans[key] = _block_mask(packing, device)
    mask: BlockMask = packing.plans[key]
    return mask


def bounds(packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Where each token's segment starts, and where its prefix starts and ends [T, rounded up to whole blocks].

    A token t sees the keys from its segment's start up to t, and those of its prefix; padding is a segment of its own.
    """
    size = -(-packing.num_tokens // BLOCK) * BLOCK
    start_T = torch.arange(size)
    prefix_start_T, prefix_end_T = torch.zeros(2, size, dtype=torch.long)
    for s in packing.segments:
        own = slice(s.start, s.start + s.length)
        start_T[own] = s.start
        if s.prefix_length:
            prefix_start_T[own], prefix_end_T[own] = s.prefix_start, s.prefix_start + s.prefix_length
    return start_T, prefix_start_T, prefix_end_T


def _block_mask(packing: Packing, device: torch.device) -> BlockMask:
    start_T, prefix_start_T, prefix_end_T = bounds(packing)

    def spread(values_T: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest per block, [blocks, 1]."""
        values = values_T.view(-1, BLOCK)
        return values.amin(1, keepdim=True), values.amax(1, keepdim=True)

    (low, high), (from_low, from_high) = spread(start_T), spread(prefix_start_T)
    to_low, to_high = spread(prefix_end_T)
    first = torch.arange(0, len(start_T), BLOCK)  # of the keys' blocks; a query's block has the same places
    last, query_first, query_last = first + BLOCK - 1, first[:, None], first[:, None] + BLOCK - 1
    may_see = ((first <= query_last) & (last >= low)) | ((first < to_high) & (last >= from_low))
    sees_all = ((last <= query_first) & (first >= high)) | ((first >= from_high) & (last < to_low))
    start, prefix_start, prefix_end = (x.to(device) for x in (start_T, prefix_start_T, prefix_end_T))

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_prefix = (key >= prefix_start[query]) & (key < prefix_end[query])
        return ((key >= start[query]) & (key <= query)) | is_prefix

    length = packing.num_tokens
    return BlockMask.from_kv_blocks(
        *_listed(may_see & ~sees_all, device),
        *_listed(sees_all, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: those first, in order."""
    counts = blocks.sum(1, dtype=torch.int32)
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True).int()
    return counts[None, None].to(device), order[None, None].to(device)


def install(causal_lm: Any, *, device: torch.device, dtype: torch.dtype) -> bool:
    """Let a transformers model whose packed attention is on compute it so, where that was tried and is right; whether it
    does."""
    from transformers import AttentionInterface

    if (reason := why_not(causal_lm.config, dtype=dtype, device=device)) is not None:
        log.info("attention: padded rows, since %s", reason)
        return False
    AttentionInterface.register(NAME, functools.partial(seams.packed_attention, attend=attend))
    causal_lm.set_attn_implementation(NAME)
    log.info("attention: FlexAttention; it gives what padded rows give on this device")
    return True


def why_not(config: Any, *, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why FlexAttention does not serve a model of this configuration on this device; None where it was tried and does.

    Small random heads go through both paths, forward and backward. The kernels are compiled here, which takes a while.
    """
    queries, keys, size, value_size = attention.head_sizes(config)
    generator = torch.Generator().manual_seed(0)
    shapes = [(queries, size), (keys, size), (keys, value_size)]
    drawn = [torch.randn(TRIED.num_tokens, *shape, generator=generator) for shape in shapes]
    weight = torch.randn(TRIED.num_tokens, queries, value_size, generator=generator).to(device, dtype)
    weight[TRIED.num_real_tokens :] = 0  # padding gets some output, on which nothing may depend

    def outcome(run: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [x.to(device, dtype, copy=True).requires_grad_() for x in drawn]
        out = run(*inputs, TRIED)
        (out * weight).sum().backward()
        return [(out * weight).detach(), *(x.grad for x in inputs if x.grad is not None)]

    try:
        found = outcome(attend)
    except Exception as error:  # compilers raise anything; the other path is there
        return f"FlexAttention does not run here: {str(error).strip().splitlines()[0][:200]}"
    for ours, theirs in zip(found, outcome(attention.attend), strict=True):
        off = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        if not off < (1e-4 if dtype == torch.float32 else 0.03):
            return f"FlexAttention gives other numbers here: {off:.1e} off"
    return None
