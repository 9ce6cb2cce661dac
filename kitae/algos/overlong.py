"""DAPO's soft punishment of completions that come close to the longest one allowed."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_penalty(lengths_PG: Tensor, *, longest: int, buffer: int) -> Tensor:
    """0 up to longest - buffer tokens, from there in a straight line to -1 at `longest` (arXiv:2503.14476, eq. 13).

    A completion cut at `longest` is the paper's "beyond": it gets -1.
    """
    return ((longest - buffer - lengths_PG.to(torch.float32)) / buffer).clamp(-1.0, 0.0)
