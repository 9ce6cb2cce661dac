"""Causal attention over packed rows, without computing padding: kernels of our own, or torch's on padded buckets.

    packing --plan--> buckets of segments of similar length --q, k, v into slots--> attention --> back to tokens

Segments that continue a shared prompt attend to [prompt ; themselves], as in arXiv:2502.09982 (PrefixGrouper).
Dimension key besides types.py's: S slots (the places of all buckets, laid end to end), Q query heads,
K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kitae.models import native
from kitae.models.moves import move
from kitae.types import Packing, Segment

CALL_COST = 6000.0
"""What one more attention call costs, in units of one query-key pair; found on a CPU."""
FLOAT32_UP_TO = 512
"""On a CPU, shorter rows are attended to in float32: the half-precision backward is slower there."""
ROUND_TO = 32
"""Bucket lengths above this are rounded up to a multiple of it, so that shapes repeat."""
MAX_ROWS = 64
"""Rows in one bucket."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows of one padded attention call; they share one prefix, or have none."""

    num_rows: int
    length: int
    prefix_start: int
    prefix_length: int
    mask: Tensor | None
    """[length, prefix_length + length], True where seen; None without a prefix, where causal says it all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each packed token lies in the buckets, and back."""

    buckets: list[Bucket]
    token_of_slot_S: Tensor
    slot_of_token_T: Tensor
    empty_slots: Tensor
    padding_tokens: Tensor

    @property
    def sizes(self) -> list[int]:
        return [b.num_rows * b.length for b in self.buckets]


def plan_of(packing: Packing, device: torch.device) -> Plan:
    """The packing's plan on `device`, derived once and kept with the packing."""
    key = ("attention", device)
    if key not in packing.plans:
        packing.plans[key] = _plan(packing, device)
    plan: Plan = packing.plans[key]
    return plan


@dataclass(frozen=True, slots=True)
class Runs:
    """Segments in the order of the kernels: those that see the same prompt behind each other, after the prompt."""

    segments: Tensor
    """Segment's four numbers each, [segments, 4]."""
    groups: Tensor
    """Where the segments of each prompt begin, and the end."""


def runs_of(packing: Packing) -> Runs | None:
    """The packing for the kernels, derived once; None where a prefix is not the beginning of a segment that has none."""
    if "runs" not in packing.plans:
        packing.plans["runs"] = _runs(packing)
    runs: Runs | None = packing.plans["runs"]
    return runs


def _runs(packing: Packing) -> Runs | None:
    lengths = {s.start: s.length for s in packing.segments if not s.prefix_length}
    by_prompt: dict[int, list[Segment]] = {}
    for s in packing.segments:
        if s.prefix_length > lengths.get(s.prefix_start, 0):
            return None
        by_prompt.setdefault(s.prefix_start if s.prefix_length else s.start, []).append(s)

    def cost(segments: list[Segment]) -> int:
        return sum(s.length * (2 * s.prefix_length + s.length) for s in segments)

    # Whichever thread is free takes the next: long ones first.
    runs = sorted(by_prompt.values(), key=cost, reverse=True)
    groups = [0, *accumulate(map(len, runs))]
    return Runs(torch.tensor([s for run in runs for s in run]), torch.tensor(groups))


def attend(
    q_TQD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    packing: Packing,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    kernels: bool = False,
) -> Tensor:
    """Attention of every packed token to its prefix and its segment up to itself, [T, Q, D of v].

    Values may have another head size than keys (latent attention). Padding tokens get some finite output, and neither
    give nor take gradient. With `kernels`, those of native.py compute it where they can.
    """
    if (
        kernels
        and not dropout
        and native.fits(q_TQD, k_TKD, v_TKD)
        and (runs := runs_of(packing)) is not None
    ):
        own = q_TQD.shape[-1] ** -0.5 if scaling is None else scaling
        padding = (packing.num_real_tokens, packing.num_tokens)
        return native.attend(
            q_TQD, k_TKD, v_TKD, segments=runs.segments, groups=runs.groups, padding=padding, scaling=own
        )
    plan = plan_of(packing, q_TQD.device)
    value_size = v_TKD.shape[-1]
    if value_size != q_TQD.shape[-1]:  # torch's fused kernels want one head size
        v_TKD = F.pad(v_TKD, (0, q_TQD.shape[-1] - value_size))
    to_slots, to_tokens = plan.token_of_slot_S, plan.slot_of_token_T
    q_S, k_S, v_S = (
        torch.split(move(x, to_slots, back=to_tokens, unused=plan.padding_tokens), plan.sizes)
        for x in (q_TQD, k_TKD, v_TKD)
    )
    out_S = [
        _attend_bucket(bucket, q_S[i], k_S[i], v_S[i], k_TKD, v_TKD, scaling=scaling, dropout=dropout)
        for i, bucket in enumerate(plan.buckets)
    ]
    out_T = move(torch.cat(out_S), to_tokens, back=to_slots, unused=plan.empty_slots)
    return out_T[..., :value_size]


def _attend_bucket(
    bucket: Bucket,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    *,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    n, m, dtype = bucket.num_rows, bucket.length, q.dtype
    q, k, v = (x.view(n, m, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    if bucket.prefix_length:
        k, v = (torch.cat((_prefix(x, bucket), own), dim=2) for x, own in ((k_TKD, k), (v_TKD, v)))
    if q.device.type == "cpu" and k.shape[2] <= FLOAT32_UP_TO:
        q, k, v = q.float(), k.float(), v.float()
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bucket.mask,
        is_causal=bucket.mask is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2).reshape(n * m, q.shape[1], -1).to(dtype)


def _prefix(x_TKD: Tensor, bucket: Bucket) -> Tensor:
    """Keys or values of the bucket's prefix, [rows, K, prefix, D]."""
    own = x_TKD.narrow(0, bucket.prefix_start, bucket.prefix_length).transpose(0, 1)
    return own.expand(bucket.num_rows, -1, -1, -1)


def _plan(packing: Packing, device: torch.device) -> Plan:
    buckets: list[Bucket] = []
    token_of_slot: list[int] = []
    empty: list[int] = []
    slot_of_token = [0] * packing.num_tokens

    def prefix_of(s: Segment) -> tuple[int, int]:
        return s.prefix_start, s.prefix_length

    for (start, prefix), group in groupby(sorted(packing.segments, key=prefix_of), key=prefix_of):
        for segments in cut(sorted(group, key=lambda s: -s.length), prefix_length=prefix):
            length = _round_up(segments[0].length)
            mask = torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix)
            buckets.append(Bucket(len(segments), length, start, prefix, mask if prefix else None))
            for segment in segments:
                for i in range(length):
                    if i < segment.length:
                        slot_of_token[segment.start + i] = len(token_of_slot)
                        token_of_slot.append(segment.start + i)
                    else:
                        empty.append(len(token_of_slot))
                        token_of_slot.append(0)
    real = packing.num_real_tokens
    return Plan(
        buckets=buckets,
        token_of_slot_S=torch.tensor(token_of_slot, device=device),
        slot_of_token_T=torch.tensor(slot_of_token, device=device),
        empty_slots=torch.tensor(empty, dtype=torch.long, device=device),
        padding_tokens=torch.arange(real, packing.num_tokens, device=device),
    )


def cut(segments: Sequence[Segment], *, prefix_length: int = 0) -> list[list[Segment]]:
    """Cut segments, longest first, into the buckets of least cost: attended area plus CALL_COST per call."""
    # Of the first j segments: least cost, where the last bucket starts.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for j in range(1, len(segments) + 1):
        choices = []
        for i in range(max(0, j - MAX_ROWS), j):
            longest = _round_up(segments[i].length)
            area = (j - i) * longest * (prefix_length + longest / 2)
            choices.append((best[i][0] + area + CALL_COST, i))
        best.append(min(choices))
    cuts = [len(segments)]
    while cuts[-1] > 0:
        cuts.append(best[cuts[-1]][1])
    return [list(segments[i:j]) for j, i in pairwise(cuts)][::-1]


def _round_up(length: int) -> int:
    return length if length <= ROUND_TO else -(-length // ROUND_TO) * ROUND_TO


def head_sizes(config: Any) -> tuple[int, int, int, int]:
    """Query heads, key-value heads, and the sizes of a key and of a value, as attention sees them."""
    text = config.get_text_config()
    heads: int = text.num_attention_heads
    if getattr(text, "kv_lora_rank", None):  # latent attention lays out every head's keys and values
        return heads, heads, text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    size: int = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, getattr(text, "num_key_value_heads", None) or heads, size, size
