"""Backward pass of one span of the delta rule; the formulas of ``delta.py`` transposed.

Shapes: as in ``additive.py``; r is 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.chunked.chunk_plan import ChunkSpan
from hybrid_kernels.chunked.delta import (
    DeltaBuffers,
    DeltaRows,
    DeltaWrites,
    exact_reads,
    load_rows,
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
        dreads: (b, 2 C, V), split in ``do``, the output's gradient times its factor, and
            ``residual_below``.
        residual: (b, C, V) gradient of what the inverse is applied to, over beta. Not at once in
            ``residual_below``: a batched product into memory with gaps is many single ones.
        dwritten: (b, C, V) gradient of u.
        dpairs: (b, 2 C, C), the lower half of which is ``dpairs_below``.
        dread: (b, 2 C, K) gradient of ``DeltaBuffers.read``, over -beta in the lower half; split in
            ``dqueries`` and ``derasing``.
        dwrite: (b, C, K) gradient of ``DeltaBuffers.write``, in the memory of ``dwritten``.
        reads: (b, 2 C, K) ``read`` times ``dread``, split in ``query_reads`` and ``erasing_reads``,
            in the memory of ``dreads``.
        dstates: around each chunk.
        step_dwritten, step_carry, step_erase: by step, the last one transposed.
    """

    dreads: Tensor
    do: Tensor
    residual_below: Tensor
    residual: Tensor
    dwritten: Tensor
    dpairs: Tensor
    dpairs_below: Tensor
    dread: Tensor
    dqueries: Tensor
    derasing: Tensor
    dwrite: Tensor
    reads: Tensor
    query_reads: Tensor
    erasing_reads: Tensor
    dstates: SpanStates
    step_dwritten: tuple[Tensor, ...]
    step_carry: tuple[Tensor, ...]
    step_erase: tuple[Tensor, ...]


class ExactPairGradients(NamedTuple):
    """Gradients through the pairs of rows where keys decay exactly.

    Attributes:
        diagonal: (b, C, 1) gradient of P's diagonal.
        read: (b, 2, C, K) gradient of ``exact_reads``.
        write: (b, C, K) gradient of the undecayed keys that write.
        decay: (b, C, K or 1) gradient of the log decay.
    """

    diagonal: Tensor
    read: Tensor
    write: Tensor
    decay: Tensor


def _lay_out(x: InputChunks, span: ChunkSpan, m: DeltaBuffers, work: Scratch) -> GradientBuffers:
    sizes, (count, chunk, value_dim) = span.sizes(x.heads), m.values.shape
    dreads = work.take("dreads", count, 2 * chunk, value_dim)
    dwritten = work.take("dwritten", count, chunk, value_dim)
    dpairs = work.take("pairs", count, 2 * chunk, chunk)
    dread, reads = work.take("dread", *m.read.shape), work.take("dreads", *m.read.shape)
    dstates = work.take("dstates", span.states(x.heads), *x.state_shape)
    return GradientBuffers(
        dreads,
        *halves(dreads),
        work.take("erase", count, chunk, value_dim),
        dwritten,
        dpairs,
        dpairs[:, chunk:],
        dread,
        *halves(dread),
        work.take("dwritten", *m.write.shape),
        reads,
        *halves(reads),
        split_states(dstates, span, x.heads),
        dwritten.split_with_sizes(sizes),
        m.carry.split_with_sizes(sizes),
        m.erase.mT.split_with_sizes(sizes),
    )


def delta_backward(
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
    writes = recall(x, rows, span, saved)
    m = rows.buffers
    d = work.once("delta_backward", span.sizes(x.heads), lambda: _lay_out(x, span, m, work))
    load(grad_output.squeeze(4), x.dtype, rows.output_factor, d.do)
    _pass_states_back(rows, writes, d, carry)
    dtotal = None
    if grads.of_decays and rows.total is not None:
        states, over_keys = rows.buffers.states, rows.key_gate is not None
        dtotal = total_gradient(x, rows.total, states, d.dstates, over_keys, work)
    exact = _row_gradients(x, rows, writes, d)
    # For beta and for the decays: rows times their gradients.
    torch.mul(m.read, d.dread, out=d.reads)
    written = None
    if rows.key_gate and grads.of_decays:
        written = torch.mul(m.write, d.dwrite, out=work.take("writes", *m.write.shape))
    given = _store_values(rows, d, exact, grads)
    _store_keys(rows, d, exact, grads)
    if grads.value_decay is not None:
        assert rows.value_gate is not None
        assert dtotal is not None
        read = d.query_reads.sum(-1, keepdim=True)
        dg = rows.value_gate.backward(read, given.mul_(rows.beta), dtotal)
        store(grads.value_decay, dg)
    if grads.key_decay is not None:
        assert written is not None
        assert dtotal is not None
        _store_key_decay(rows, d, written, dtotal, exact, grads.key_decay)


def _pass_states_back(
    rows: DeltaRows, writes: DeltaWrites, d: GradientBuffers, carry: StateCarry
) -> None:
    """Fill ``dstates`` and ``dwritten``."""
    states, totals = d.dstates, rows.totals
    carry.enter(states.step_ends[-1])
    # What each chunk's reads add lies where the gradient before it will.
    torch.bmm(rows.buffers.queries.mT, d.do, out=states.starts)
    torch.bmm(writes.query_pairs.mT, d.do, out=d.dwritten)
    for i, after, before in walk_back(states.step_starts, states.step_ends, carry):
        du = d.step_dwritten[i].baddbmm_(d.step_carry[i], after)
        if totals is None:
            before.add_(after)
        else:
            before.addcmul_(after, totals[i])
        before.baddbmm_(d.step_erase[i], du, alpha=-1)


def total_gradient(
    x: InputChunks,
    total: Tensor,
    states: SpanStates,
    dstates: SpanStates,
    over_keys: bool,
    work: Scratch,
) -> Tensor:
    """Return the total decay times its gradient, (b, K) or (b, 1).

    Rescaled, the whole state after the chunk goes through the total decay; exact, only the state
    before it does.

    Args:
        x: the inputs.
        total: (b, K or 1, 1).
        states: around each chunk.
        dstates: their gradients.
        over_keys: return the part of each key.
        work: in which ``dread`` is overwritten.
    """
    through = states.starts if x.exact else states.ends
    product = torch.mul(through, dstates.ends, out=work.take("dread", *through.shape))
    dtotal = product.sum(2) if over_keys else product.sum((1, 2))[:, None]
    return dtotal.mul_(total.squeeze(2)) if x.exact else dtotal


def _row_gradients(
    x: InputChunks, rows: DeltaRows, writes: DeltaWrites, d: GradientBuffers
) -> ExactPairGradients | None:
    """Fill ``residual``, ``dread`` and ``dwrite``; return the gradients through exact pairs."""
    m = rows.buffers
    torch.bmm(writes.inverse.mT, d.dwritten, out=d.residual)
    d.residual_below.copy_(d.residual)
    torch.bmm(d.dreads, writes.written.mT, out=d.dpairs)
    torch.bmm(d.dreads, m.states.starts.mT, out=d.dread)
    torch.bmm(writes.written, d.dstates.ends.mT, out=d.dwrite)
    if rows.total is not None and not x.exact:
        # What rescaled rows write decays to the chunk's end.
        d.dwrite.mul_(rows.total.mT)
    if x.exact_keys:
        assert rows.k is not None
        assert rows.key_gate is not None
        diagonal = d.dpairs.diagonal(dim1=1, dim2=2)[..., None].clone()
        d.dpairs_below.neg_()
        by_kind = d.dpairs.unflatten(1, (2, -1))
        exact = key_pairs_backward(by_kind, exact_reads(rows), rows.k, rows.key_gate.g, False)
        return ExactPairGradients(diagonal, *exact)
    d.dpairs.unflatten(1, (2, -1)).tril_()
    d.dpairs_below.diagonal(dim1=1, dim2=2).zero_()
    d.dread.baddbmm_(d.dpairs, m.write)
    d.dpairs_below.mul_(-rows.beta)
    d.dwrite.baddbmm_(d.dpairs.mT, m.read)
    return None


def _store_values(
    rows: DeltaRows, d: GradientBuffers, exact: ExactPairGradients | None, grads: ChunkGradients
) -> Tensor:
    """Store the gradients of v and of beta; return the part of beta's through v, (b, C, 1)."""
    assert grads.beta is not None
    values = rows.buffers.values
    product = torch.mul(values, d.residual, out=values)
    given, strength = product.sum(-1, keepdim=True), rows.beta
    if rows.value_gate:
        strength = strength * rows.value_gate.write
    taken = d.erasing_reads.sum(-1, keepdim=True)
    if exact is not None:
        taken -= (rows.k * exact.read[:, 1]).sum(-1, keepdim=True)
    store(grads.beta, given - taken)
    store(grads.v.squeeze(4), d.residual, strength)
    return given


def _store_keys(
    rows: DeltaRows, d: GradientBuffers, exact: ExactPairGradients | None, grads: ChunkGradients
) -> None:
    """Store the gradients of q and k; give up those of the decayed rows."""
    gate, dk, beta = rows.key_gate, d.dwrite, rows.beta
    if gate is None:
        store(grads.q, d.dqueries)
        store(grads.k, dk.addcmul_(d.derasing, beta, value=-1))
    elif exact is None:
        store(grads.q, d.dqueries, gate.read)
        d.derasing.mul_(beta)
        store(grads.k, dk.mul_(gate.write).addcmul_(d.derasing, gate.read, value=-1))
    else:
        assert rows.q is not None
        assert rows.k is not None
        dq = torch.addcmul(exact.read[:, 0], d.dqueries, gate.read)
        derase = torch.addcmul(exact.read[:, 1], d.derasing, gate.read, value=-1)
        dk = torch.addcmul(exact.write, dk, gate.write).addcmul_(derase, beta)
        store(grads.q, dq.addcmul_(exact.diagonal, rows.k))
        store(grads.k, dk.addcmul_(exact.diagonal, rows.q))


def _store_key_decay(
    rows: DeltaRows,
    d: GradientBuffers,
    written: Tensor,
    dtotal: Tensor,
    exact: ExactPairGradients | None,
    chunks: Tensor,
) -> None:
    """Store the gradient of the log decay: every factor times its own gradient, summed."""
    assert rows.key_gate is not None
    read = d.query_reads.addcmul_(d.erasing_reads, rows.beta, value=-1)
    if rows.key_gate.read.shape[2] == 1:
        read, written, dtotal = (y.sum(-1, keepdim=True) for y in (read, written, dtotal))
    dg = rows.key_gate.backward(read, written, dtotal)
    store(chunks, dg if exact is None else dg.add_(exact.decay))
