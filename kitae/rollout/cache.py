"""Keys and values of the rows in flight, and one-token attention over them.

Per layer, on its device, one tensor [slots, K, capacity, D] each: a decode step reads the first slots as they lie, without
gathering. Memory grows with the longest row in flight. Dimension key besides types.py's: Q query heads,
K key-value heads, D head size, U tokens in use (the longest row's length).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kitae.models import attention
from kitae.types import Packing

GROWTH = 64
"""Capacity in tokens is a multiple of this."""


class Prompt(NamedTuple):
    """Where a packed prompt lies in a prefill, and the slots that get its keys and values."""

    start: int
    length: int
    slots: list[int]


class Step(NamedTuple):
    """What one decode step's attention needs in every layer."""

    slots_B: Tensor
    positions_B: Tensor
    bias_B1U: Tensor
    """0 where a row has a token, -inf beyond its last one."""


class SlotCache:
    """The attention cache of GenericEngine; tell it what comes next with begin_prefill or begin_step."""

    def __init__(
        self, *, num_slots: int, max_length: int | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Room for `num_slots` rows; none may become longer than `max_length` tokens, where there is such a limit."""
        self._num_slots = num_slots
        self._max_length = max_length
        self._device = device
        self._dtype = dtype
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._next: list[Prompt] | Step = []
        self._steps: dict[torch.device, Step] = {}
        """The next step's tensors on every device that has layers."""
        self._capacity = 0

    def begin_prefill(self, prompts: list[Prompt]) -> None:
        """The next forward computes these packed prompts."""
        self._next = prompts
        self._require(max(p.length for p in prompts))

    def begin_step(self, positions: Sequence[int]) -> None:
        """The next forward computes one token per slot 0, 1, ..., at these positions."""
        used = max(positions) + 1
        self._require(used)
        slots_B = torch.arange(len(positions), device=self._device)
        positions_B = torch.tensor(positions, device=self._device)
        is_beyond = torch.arange(used, device=self._device) > positions_B[:, None]
        bias_BU = torch.zeros(is_beyond.shape, device=self._device).masked_fill_(is_beyond, -torch.inf)
        self._next = Step(slots_B, positions_B, bias_BU[:, None])
        self._steps = {slots_B.device: self._next}

    def attend(
        self, layer_idx: int, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packing: Packing, scaling: float
    ) -> Tensor:
        """What the attention seam calls in every layer: store keys and values, return the attention [T, Q, D]."""
        keys, values = self._layer(layer_idx, k_TKD, v_TKD)
        if isinstance(self._next, Step):
            device = keys.device
            if device not in self._steps:
                self._steps[device] = Step(*(tensor.to(device) for tensor in self._next))
            step = self._steps[device]
            keys[step.slots_B, :, step.positions_B] = k_TKD.to(self._dtype)
            values[step.slots_B, :, step.positions_B] = v_TKD.to(self._dtype)
            return self._attend_step(q_TQD, keys, values, step.bias_B1U, scaling)
        for start, length, slots in self._next:
            keys[slots, :, :length] = k_TKD[start : start + length].transpose(0, 1).to(self._dtype)
            values[slots, :, :length] = v_TKD[start : start + length].transpose(0, 1).to(self._dtype)
        return attention.attend(q_TQD, k_TKD, v_TKD, packing, scaling=scaling)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy rows from slot to slot; no slot is both left and entered."""
        if moves:
            source, target = (list(x) for x in zip(*moves, strict=True))
            for pair in self._layers.values():
                for tensor in pair:
                    tensor[target] = tensor[source]

    def _attend_step(
        self, q_BQD: Tensor, keys: Tensor, values: Tensor, bias_B1U: Tensor, scaling: float
    ) -> Tensor:
        num_rows, query_heads, _ = q_BQD.shape
        heads, used = keys.shape[1], bias_B1U.shape[-1]
        k, v = (x[:num_rows, :, :used].flatten(0, 1) for x in (keys, values))  # views
        # Query heads that share a key-value head are the rows of one small matrix product.
        q = (q_BQD * scaling).to(self._dtype).reshape(num_rows * heads, query_heads // heads, -1)
        scores = torch.bmm(q, k.transpose(1, 2)).float().view(num_rows, query_heads, used)
        weights = scores.add_(bias_B1U).softmax(-1).to(self._dtype)
        out = torch.bmm(weights.view(num_rows * heads, query_heads // heads, used), v)
        return out.view(num_rows, query_heads, -1).to(q_BQD.dtype)

    def _layer(self, index: int, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values with room for `_capacity` tokens per slot."""
        old = self._layers.get(index)
        if old is None or old[0].shape[2] < self._capacity:
            shapes = [(self._num_slots, x.shape[1], self._capacity, x.shape[2]) for x in (k_TKD, v_TKD)]
            new = [torch.empty(s, device=k_TKD.device, dtype=self._dtype) for s in shapes]
            length = old[0].shape[2] if old else 0
            for i, tensor in enumerate(new):
                if old:
                    tensor[:, :, :length] = old[i]
                tensor[:, :, length:] = 0  # whatever lay there could be NaN, and 0 * NaN is NaN
            self._layers[index] = (new[0], new[1])
        return self._layers[index]

    def _require(self, tokens: int) -> None:
        """Grow by half when room is short, in whole steps of GROWTH, but not beyond the longest row there can be."""
        if tokens > self._capacity:
            wanted = max(tokens, min(self._capacity * 3 // 2, self._max_length or sys.maxsize))
            self._capacity = -(-wanted // GROWTH) * GROWTH
