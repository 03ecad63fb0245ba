"""Backward pass of one span of a diagonal plus low rank transition; ``dplr.py`` transposed.

Shapes: as in ``additive.py``; r is 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.chunked.chunk_plan import ChunkSpan
from hybrid_kernels.chunked.delta_backward import total_gradient
from hybrid_kernels.chunked.dplr import (
    DplrBuffers,
    DplrPairs,
    DplrRows,
    load_rows,
    quarters,
    recall,
)
from hybrid_kernels.chunked.gradients import ChunkGradients
from hybrid_kernels.chunked.inputs import InputChunks
from hybrid_kernels.chunked.memory import Scratch, halves, load, store
from hybrid_kernels.chunked.pairs import key_pairs_backward
from hybrid_kernels.chunked.saved import Saved
from hybrid_kernels.chunked.state_walk import SpanStates, StateCarry, split_states, walk_back


class GradientBuffers(NamedTuple):
    """Memory for the gradients of one span, laid out once for all spans of one shape.

    Attributes:
        dreads: (b, 2 C, V), split in ``do``, the output's gradient times the scale, and
            ``residual_below``.
        residual: (b, C, V) gradient of what the inverse is applied to. Not at once in
            ``residual_below``: a batched product into memory with gaps is many single ones.
        written: (b, 2 C, V) y and v.
        dy, dvalues: (b, C, V) their gradients.
        dpairs: (b, 2 C, 2 C), in the memory of ``DplrBuffers.pairs``.
        dread, dwrite: (b, 2 C, K) gradients of ``DplrBuffers.read`` and ``write``.
        dstates: around each chunk.
        step_dy, step_carry, step_erase: by step, the last one transposed.
    """

    dreads: Tensor
    do: Tensor
    residual_below: Tensor
    residual: Tensor
    written: Tensor
    dy: Tensor
    dvalues: Tensor
    dpairs: Tensor
    dread: Tensor
    dwrite: Tensor
    dstates: SpanStates
    step_dy: tuple[Tensor, ...]
    step_carry: tuple[Tensor, ...]
    step_erase: tuple[Tensor, ...]


class RowGradients(NamedTuple):
    """Gradients of undecayed rows through the pairs of a chunk, where keys decay exactly.

    Attributes:
        read, write: (b, 2, C, K).
        decay: (b, C, K or 1) of the log decay.
    """

    read: Tensor
    write: Tensor
    decay: Tensor


def _lay_out(x: InputChunks, span: ChunkSpan, m: DplrBuffers, work: Scratch) -> GradientBuffers:
    sizes, (count, chunk, value_dim) = span.sizes(x.heads), m.values.shape
    dreads = work.take("dreads", count, 2 * chunk, value_dim)
    dy = work.take("dy", count, chunk, value_dim)
    dstates = work.take("dstates", span.states(x.heads), *x.state_shape)
    return GradientBuffers(
        dreads,
        *halves(dreads),
        work.take("output", count, chunk, value_dim),
        work.take("written", count, 2 * chunk, value_dim),
        dy,
        work.take("dvalues", count, chunk, value_dim),
        m.pairs,
        work.take("dread", *m.read.shape),
        work.take("dwrite", *m.write.shape),
        split_states(dstates, span, x.heads),
        dy.split_with_sizes(sizes),
        m.carry_erased.split_with_sizes(sizes),
        m.erase.mT.split_with_sizes(sizes),
    )


def dplr_backward(
    x: InputChunks,
    span: ChunkSpan,
    carry: StateCarry,
    saved: Saved,
    work: Scratch,
    output: Tensor | None,
    grad_output: Tensor,
    grads: ChunkGradients,
) -> None:
    """Compute the gradients of one span; arguments as for ``additive_backward``."""
    rows = load_rows(x, span, work)
    pairs, inverse, read = recall(x, rows, span, saved)
    m = rows.buffers
    d = work.once("dplr_backward", span.sizes(x.heads), lambda: _lay_out(x, span, m, work))
    load(grad_output.squeeze(4), x.dtype, x.scale_tensor, d.do)
    for part, out in zip((read, m.values), halves(d.written), strict=True):
        out.copy_(part)
    _pass_states_back(rows, pairs, d, carry)
    dtotal = None
    if grads.key_decay is not None:
        assert rows.total is not None
        dtotal = total_gradient(x, rows.total, m.states, d.dstates, True, work)
    torch.bmm(inverse.mT, d.dy, out=d.residual)
    d.residual_below.copy_(d.residual)
    d.dvalues.baddbmm_(m.carry_keys, d.dstates.ends).baddbmm_(pairs.erasing_keys.mT, d.residual)
    store(grads.v.squeeze(4), d.dvalues)
    exact = _row_gradients(x, rows, d)
    if grads.key_decay is not None:
        assert dtotal is not None
        _store_key_decay(rows, d, dtotal, exact, work, grads.key_decay)
    _store_rows(rows, d, exact, grads)


def _pass_states_back(
    rows: DplrRows, pairs: DplrPairs, d: GradientBuffers, carry: StateCarry
) -> None:
    """Fill ``dstates`` and ``dy``, and ``dvalues`` with the part of the output."""
    states, totals = d.dstates, rows.totals
    carry.enter(states.step_ends[-1])
    # What each chunk's reads add lies where the gradient before it will.
    torch.bmm(rows.buffers.queries.mT, d.do, out=states.starts)
    torch.bmm(pairs.query_erased.mT, d.do, out=d.dy)
    torch.bmm(pairs.query_keys.mT, d.do, out=d.dvalues)
    for i, after, before in walk_back(states.step_starts, states.step_ends, carry):
        dy = d.step_dy[i].baddbmm_(d.step_carry[i], after)
        if totals is None:
            before.add_(after)
        else:
            before.addcmul_(after, totals[i])
        before.baddbmm_(d.step_erase[i], dy)


def _row_gradients(x: InputChunks, rows: DplrRows, d: GradientBuffers) -> RowGradients | None:
    """Fill ``dread`` and ``dwrite``; return the gradients through exact pairs."""
    m = rows.buffers
    torch.bmm(d.dreads, d.written.mT, out=d.dpairs)
    torch.bmm(d.dreads, m.states.starts.mT, out=d.dread)
    torch.bmm(d.written, d.dstates.ends.mT, out=d.dwrite)
    if rows.total is not None and not x.exact:
        # What rescaled rows write decays to the chunk's end.
        d.dwrite.mul_(rows.total.mT)
    if x.exact_keys:
        return _exact_gradients(rows, d)
    by_query, by_erasing = quarters(d.dpairs)
    for part in by_query:
        part.tril_()
    for part in by_erasing:
        part.tril_(-1)
    d.dread.baddbmm_(d.dpairs, m.write)
    d.dwrite.baddbmm_(d.dpairs.mT, m.read)
    return None


def _exact_gradients(rows: DplrRows, d: GradientBuffers) -> RowGradients:
    """Return the gradients through pairs where keys decay exactly."""
    assert rows.plain_read is not None
    assert rows.plain_write is not None
    assert rows.gate is not None
    dread, decay, dwrite = torch.zeros_like(rows.plain_read), torch.zeros_like(rows.gate.g), []
    by_kind = d.dpairs.unflatten(1, (2, -1)).unflatten(3, (2, -1)).unbind(3)
    for dpairs, write in zip(by_kind, rows.plain_write.unbind(1), strict=True):
        parts = key_pairs_backward(dpairs, rows.plain_read, write, rows.gate.g, False)
        own = dpairs[:, 0].diagonal(dim1=1, dim2=2)[..., None]
        dread += parts[0]
        dread[:, 0].addcmul_(own, write)
        dwrite.append(parts[1].addcmul_(own, rows.plain_read[:, 0]))
        decay += parts[2]
    return RowGradients(dread, torch.stack(dwrite, dim=1), decay)


def _store_rows(
    rows: DplrRows, d: GradientBuffers, exact: RowGradients | None, grads: ChunkGradients
) -> None:
    """Store the gradients of q, k, the erase query and the erase key."""
    assert grads.erase_query is not None
    assert grads.erase_key is not None
    read, write = halves(d.dread), halves(d.dwrite)
    factors = (None, None) if rows.gate is None else (rows.gate.read, rows.gate.write)
    parts = (read, factors[0], (grads.q, grads.erase_query), None if exact is None else exact.read)
    _store_decayed(*parts)
    parts = (write, factors[1], (grads.erase_key, grads.k), None if exact is None else exact.write)
    _store_decayed(*parts)


def _store_decayed(
    rows: tuple[Tensor, Tensor],
    factor: Tensor | None,
    chunks: tuple[Tensor, Tensor],
    exact: Tensor | None,
) -> None:
    """Store two gradients of decayed rows times ``factor``, plus their part in ``exact``."""
    for i, (x, out) in enumerate(zip(rows, chunks, strict=True)):
        if exact is None:
            store(out, x, factor)
        else:
            assert factor is not None
            store(out, exact[:, i].addcmul(x, factor))


def _store_key_decay(
    rows: DplrRows,
    d: GradientBuffers,
    dtotal: Tensor,
    exact: RowGradients | None,
    work: Scratch,
    chunks: Tensor,
) -> None:
    """Store the gradient of the log decay: every factor times its own gradient, summed."""
    assert rows.gate is not None
    m, sums = rows.buffers, []
    for name, x, dx in (("carry", m.read, d.dread), ("read", m.write, d.dwrite)):
        # That memory has been used: ``carry`` first, then ``read``.
        upper, lower = halves(torch.mul(x, dx, out=work.take(name, *x.shape)))
        sums.append(upper.add_(lower))
    if rows.gate.read.shape[2] == 1:
        sums = [y.sum(-1, keepdim=True) for y in sums]
        dtotal = dtotal.sum(-1, keepdim=True)
    dg = rows.gate.backward(*sums, dtotal)
    store(chunks, dg if exact is None else dg.add_(exact.decay))
