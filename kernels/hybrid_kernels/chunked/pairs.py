"""Decayed products of pairs of rows within a chunk when the gates are too strong to rescale.

The strictly lower triangle of a chunk is cut recursively: the lower left quarter, then the lower
left quarters of the two diagonal halves, and so on down to single entries. All pairs (i, j) of one
such block straddle its split point r, so exp(G_i - G_j) is exp(G_i - G_r) on the row times
exp(G_r - G_j) on the column, two factors of at most 1, and the block is one matrix product. Every
exponent is a sum of its own log decays; nothing is a difference of sums, neither here nor in the
gradients.

Shapes: b chunks x heads, X kinds of reading rows, C chunk, K key dim, V value dim, D key or value
dim or 1; n blocks of s rows at a level.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybrid_kernels.chunked.gates import remaining_sum, running_sum


def key_pairs(x: Tensor, k: Tensor, g: Tensor, exclusive: bool) -> Tensor:
    """Return M_ij = sum_K x_i k_j exp(G_i - G_j) for i > j, 0 elsewhere.

    Args:
        x: (b, X, C, K) reading rows.
        k: (b, C, K) writing rows.
        g: (b, C, D) finite log decays over keys.
        exclusive: use G_{i-1} in place of G_i.
    """
    pairs = x.new_zeros(*x.shape[:3], k.shape[1])
    for size, low, up in _levels(g, exclusive):
        block = _halves(x, size)[:, :, :, 1] * low[:, None]
        product = torch.matmul(block, (_halves(k, size)[:, :, 0] * up)[:, None].mT)
        _blocks(pairs, size).copy_(product)
    return pairs


def key_pairs_backward(
    dpairs: Tensor, x: Tensor, k: Tensor, g: Tensor, exclusive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, k and g; entries of ``dpairs`` outside i > j are not read."""
    dx, dk, dg = torch.zeros_like(x), torch.zeros_like(k), torch.zeros_like(g)
    for size, low, up in _levels(g, exclusive):
        reads = _halves(x, size)[:, :, :, 1] * low[:, None]
        writes = _halves(k, size)[:, :, 0] * up
        dblock = _blocks(dpairs, size)
        dreads = torch.matmul(dblock, writes[:, None])
        dwrites = torch.matmul(dblock.mT, reads).sum(1)
        _halves(dx, size)[:, :, :, 1].addcmul_(dreads, low[:, None])
        _halves(dk, size)[:, :, 0].addcmul_(dwrites, up)
        _add_gate_gradients(dg, size, (reads * dreads).sum(1), writes * dwrites, exclusive)
    return dx, dk, dg


def apply_pairs(pairs: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Return o_i = sum over j < i of pairs_ij v_j exp(G_i - G_j), the decay over values.

    Args:
        pairs: (b, C, C).
        v: (b, C, V).
        g: (b, C, V) finite log decays over values.
    """
    o = torch.zeros_like(v)
    for size, low, up in _levels(g, exclusive=False):
        product = torch.matmul(_blocks(pairs[:, None], size)[:, 0], _halves(v, size)[:, :, 0] * up)
        _halves(o, size)[:, :, 1].addcmul_(product, low)
    return o


def apply_pairs_backward(
    do: Tensor, pairs: Tensor, v: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of pairs (zero outside i > j), v and g."""
    dpairs, dv, dg = torch.zeros_like(pairs), torch.zeros_like(v), torch.zeros_like(g)
    for size, low, up in _levels(g, exclusive=False):
        block = _blocks(pairs[:, None], size)[:, 0]
        writes = _halves(v, size)[:, :, 0] * up
        dreads = _halves(do, size)[:, :, 1] * low
        dwrites = torch.matmul(block.mT, dreads)
        _blocks(dpairs[:, None], size)[:, 0].copy_(torch.matmul(dreads, writes.mT))
        _halves(dv, size)[:, :, 0].addcmul_(dwrites, up)
        reads = torch.matmul(block, writes)
        _add_gate_gradients(dg, size, reads * dreads, writes * dwrites, exclusive=False)
    return dpairs, dv, dg


def _levels(g: Tensor, exclusive: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (s, factors of the lower halves' rows, of the upper halves' rows), coarse to fine."""
    size = g.shape[1] // 2
    while size:
        halves = _halves(g, size)
        low = running_sum(halves[:, :, 1], -1 if exclusive else 0).exp_()
        up = remaining_sum(halves[:, :, 0], -1).exp_()
        yield size, low, up
        size //= 2


def _halves(x: Tensor, size: int) -> Tensor:
    """View (..., C, D) as (..., n, 2, s, D)."""
    return x.unflatten(-2, (-1, 2, size))


def _blocks(pairs: Tensor, size: int) -> Tensor:
    """View the lower left blocks of (b, X, C, C) as (b, X, n, s, s)."""
    cut = pairs.unflatten(3, (-1, 2, size)).unflatten(2, (-1, 2, size))
    lower_left = cut[:, :, :, 1, :, :, 0]
    return lower_left.diagonal(dim1=2, dim2=4).movedim(-1, 2)


def _add_gate_gradients(
    dg: Tensor, size: int, reads: Tensor, writes: Tensor, exclusive: bool
) -> None:
    """Add the gradients of the log decays in each factor: the factor times its gradient, summed."""
    if dg.shape[-1] == 1:
        reads, writes = reads.sum(-1, keepdim=True), writes.sum(-1, keepdim=True)
    halves = _halves(dg, size)
    halves[:, :, 1] += remaining_sum(reads, -1 if exclusive else 0)
    halves[:, :, 0] += running_sum(writes, -1)
