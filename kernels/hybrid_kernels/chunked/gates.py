"""Decays inside a chunk, as factors on rows.

With G_i the sum of log decays from the chunk's start to row i, a pair (i, j) of rows decays by
exp(G_i - G_j). Two ways to write that as matrix products:

- rescaled: exp(G_i) on the reading row times exp(-G_j) on the writing row. One product for a whole
  chunk, but exp(-G_j) grows, so only where the chunk's total is bounded (``RESCALE_LIMIT``).
- exact: no exponent is ever positive. Rows that read or write the chunk's boundary states carry
  exp(G_i) and exp(G_C - G_j), each from its own sum of log decays and not from a difference of two
  sums; pairs within the chunk are built block by block (``pairs.py``).

Neither ever refers to a later row than the one it scales.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Rescaling is used only while every chunk's total log decay stays above this: exp(60) leaves
# float32 twelve decades on either side, and costs the exponent's rounding, 60 * 2^-24.
RESCALE_LIMIT = -60.0

# And while the mean per token does: with stronger decays the gradient of a decay is lost in the
# rounding of the sums that rescaling computes it from.
RESCALE_LIMIT_PER_TOKEN = -2.0

# Replaces -inf before summation; its exp is 0 in the dtype as well.
CLOSED = {torch.float32: -104.0, torch.float64: -750.0}


@lru_cache(maxsize=64)
def triangle(size: int, diagonal: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ones on and below a diagonal, zeros above."""
    return torch.ones(size, size, dtype=dtype, device=device).tril(diagonal)


def running_sum(g: Tensor, diagonal: int = 0) -> Tensor:
    """Sum rows up to and including each (diagonal 0) or before each (-1); as a product, for speed.

    Args:
        g: (..., C, K), finite.
        diagonal: 0 or -1.
    """
    return _left_product(triangle(g.shape[-2], diagonal, g.dtype, g.device), g)


def remaining_sum(g: Tensor, diagonal: int = 0) -> Tensor:
    """Sum rows from each on (diagonal 0) or after each (-1)."""
    return _left_product(triangle(g.shape[-2], diagonal, g.dtype, g.device).mT, g)


def _left_product(x: Tensor, g: Tensor) -> Tensor:
    """Return x g; single columns as the rows of one large product instead of many tiny ones."""
    if g.shape[-1] == 1:
        return torch.matmul(g.squeeze(-1), x.mT).unsqueeze(-1)
    return torch.matmul(x, g)


class Gate:
    """The factors of one decay in a run of chunks, and their gradient.

    Args:
        g: (b, C, D) log decays in the computing dtype.
        exact: which of the two ways.
        exclusive: rows read the state before their own decay (the read with a bonus).
        scale: of ``output``.

    Attributes:
        read: (b, C, D) factor of rows that read.
        output: ``read`` times ``scale``.
        write: (b, C, D) factor of rows that write.
        total: (b, D) decay of the state over the chunk.
    """

    def __init__(self, g: Tensor, exact: bool, exclusive: bool, scale: float = 1.0):
        self.exact, self.exclusive, self.g = exact, exclusive, g
        if exact:
            self.g = g.clamp(min=CLOSED[g.dtype])
            self.read = running_sum(self.g, -1 if exclusive else 0).exp_()
            self.write = remaining_sum(self.g, -1).exp_()
            self.total = self.g.sum(1).exp_()
        else:
            up = running_sum(g).exp_()
            self.write = up.reciprocal()
            self.total = up[:, -1]
            self.read = up
            if exclusive:
                self.read = torch.cat([torch.ones_like(up[:, :1]), up[:, :-1]], dim=1)
        self.output = self.read if scale == 1.0 else self.read * scale

    def split(self, sizes: list[int]) -> list[Gate]:
        """Cut along the chunks into gates that view this one's memory."""
        parts = []
        names = ("g", "read", "output", "write", "total")
        for factors in zip(*(getattr(self, name).split(sizes) for name in names), strict=True):
            part = Gate.__new__(Gate)
            part.exact, part.exclusive = self.exact, self.exclusive
            part.g, part.read, part.output, part.write, part.total = factors
            parts.append(part)
        return parts

    def backward(self, read: Tensor, write: Tensor, total: Tensor) -> Tensor:
        """Return the gradient of g from each factor times its own gradient, (b, C, D) or (b, D)."""
        if self.exact:
            dg = remaining_sum(read, -1 if self.exclusive else 0)
            dg += running_sum(write, -1)
            return dg.add_(total[:, None])
        if self.exclusive:
            read = torch.cat([read[:, 1:], torch.zeros_like(read[:, :1])], dim=1)
        sums = read - write
        sums[:, -1] += total
        return remaining_sum(sums)
