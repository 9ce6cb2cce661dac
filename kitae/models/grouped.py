"""Matrix products of groups of rows, each group with a matrix of its own: an expert's rows and the expert's weights.

One kernel for all groups (kernels/grouped.h), whose threads take panels of columns of whichever group is next; or one
product of torch's for each group. Dimension key: S rows sorted by group, E groups, I in, O out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kitae.models import native


class Rows(NamedTuple):
    """Rows [S, size]: those of a tensor, or the ones of it that `index_S` names."""

    x: Tensor
    index_S: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Groups:
    """How many rows each group has, 0 where it has none."""

    sizes_E: Tensor
    sizes: list[int]
    kernels: bool
    """Whether native.py computes; otherwise rows must come without an index."""

    @property
    def num_rows(self) -> int:
        return sum(self.sizes)


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take rows and matrices [E, O, I] of this kind: two bfloat16 numbers must make a word.

    Where the CPU multiplies bfloat16 tiles (AMX), torch's products are faster.
    """
    if not native.fits(*tensors) or not all(x.is_contiguous() for x in tensors):
        return False
    if tensors[0].dtype == torch.float32:
        return True
    has_tiles = bool(torch.cpu.get_capabilities().get("amx_tile", False))
    return not has_tiles and all(size % 2 == 0 for x in tensors for size in x.shape[1:])


def product(rows: Rows, weight_EOI: Tensor, groups: Groups, *, add_to: Tensor | None = None) -> Tensor:
    """x W^T, [S, O]; added to `add_to` where it is given."""
    y_SO = _output(rows, weight_EOI.shape[1], groups, add_to)
    if groups.kernels:
        native.grouped_product(
            *rows, groups.sizes_E, weight_EOI, is_transposed=True, adds=add_to is not None, out=y_SO
        )
        return y_SO
    for x, y, weight in _by_group(groups, [rows.x, y_SO], [weight_EOI]):
        _multiply(x, weight.t(), y, adds=add_to is not None)
    return y_SO


def back_product(rows: Rows, weight_EOI: Tensor, groups: Groups, *, add_to: Tensor | None = None) -> Tensor:
    """dY W, [S, I], of rows dY [S, O]: the gradient of what `product` multiplies."""
    x_SI = _output(rows, weight_EOI.shape[2], groups, add_to)
    if groups.kernels:
        native.grouped_product(
            *rows, groups.sizes_E, weight_EOI, is_transposed=False, adds=add_to is not None, out=x_SI
        )
        return x_SI
    for dy, dx, weight in _by_group(groups, [rows.x, x_SI], [weight_EOI]):
        _multiply(dy, weight, dx, adds=add_to is not None)
    return x_SI


def weight_gradient(grad: Rows, x: Rows, groups: Groups, *, add_to: Tensor | None = None) -> Tensor:
    """dY^T x of each group, [E, O, I], in the rows' dtype; or added to `add_to`, which is float32 and without gaps."""
    shape = (len(groups.sizes), grad.x.shape[1], x.x.shape[1])
    total_EOI = add_to
    if total_EOI is None:
        total_EOI = x.x.new_zeros(shape, dtype=torch.float32 if groups.kernels else x.x.dtype)
    if groups.kernels:
        native.add_grouped_outer_(total_EOI, *grad, *x, groups.sizes_E)
        return total_EOI.to(x.x.dtype) if add_to is None else total_EOI
    for dy, own, total in _by_group(groups, [grad.x, x.x], [total_EOI]):
        total.add_(dy.t() @ own)
    return total_EOI


def _output(rows: Rows, size: int, groups: Groups, add_to: Tensor | None) -> Tensor:
    return rows.x.new_empty(groups.num_rows, size) if add_to is None else add_to


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, adds: bool) -> None:
    if adds:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _by_group(
    groups: Groups, in_rows: Sequence[Tensor], of_groups: Sequence[Tensor]
) -> Iterator[Sequence[Tensor]]:
    """For each group with rows, its part of the tensors [S, ...], then of those [E, ...]."""
    parts = [x.split(groups.sizes) for x in in_rows] + [x.unbind() for x in of_groups]
    return (own for size, own in zip(groups.sizes, zip(*parts, strict=True), strict=True) if size)
