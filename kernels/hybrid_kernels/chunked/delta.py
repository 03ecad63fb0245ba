"""The delta rule in chunks: the forward pass of one span of chunks.

Within a chunk, with e the keys that erase and w the keys that write (one and the same unless keys
decay), S the state before the chunk, D its decay over the chunk and d the decay of the values::

    P = lower(q w^T),  A = beta strictly lower(e w^T)
    u = (I + A)^-1 beta (v / d - e S)                      arXiv 2406.06484, eq. 6-11;
    o = (P u + q S) d scale                                with decay arXiv 2412.06464, eq. 9
    S' = D S + D w^T u

Beta is applied to C x C matrices, which are half as large as rows of keys or values.

Shapes: as in ``additive.py``; r is 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.chunked.chunk_plan import ChunkSpan
from hybrid_kernels.chunked.gates import Gate
from hybrid_kernels.chunked.inputs import InputChunks
from hybrid_kernels.chunked.inverse import unit_lower_inverse
from hybrid_kernels.chunked.memory import Scratch, halves, load, store
from hybrid_kernels.chunked.pairs import key_pairs
from hybrid_kernels.chunked.saved import Saved
from hybrid_kernels.chunked.state_walk import SpanStates, StateCarry, accumulate, split_states, walk


class DeltaBuffers(NamedTuple):
    """Memory for the rows of one span, laid out once for all spans of one shape.

    Attributes:
        read: (b, 2 C, K), split in ``queries`` and ``erasing``.
        write, carry, erase: (b, C, K); ``write`` is ``erasing`` unless keys decay, and ``carry`` is
            ``write`` unless rows are rescaled.
        values: (b, C, V); holds the output once the values have been used.
        pairs: (b, 2 C, C), split in ``query_pairs`` and ``erasing_pairs``.
        own_pairs: (b, C, C) in the same memory.
        weights: (b, C, C).
        states: around each chunk.
        step_erase, step_carry: ``erase`` and the transpose of ``carry`` by step.
    """

    read: Tensor
    queries: Tensor
    erasing: Tensor
    write: Tensor
    carry: Tensor
    erase: Tensor
    values: Tensor
    pairs: Tensor
    query_pairs: Tensor
    erasing_pairs: Tensor
    own_pairs: Tensor
    weights: Tensor
    states: SpanStates
    step_erase: tuple[Tensor, ...]
    step_carry: tuple[Tensor, ...]


class DeltaRows(NamedTuple):
    """The rows of one span, loaded and decayed into ``buffers``.

    Attributes:
        buffers: ``read`` holds queries, below them the erasing keys e; ``write`` w; ``carry``
            writing rows as they reach the end of the chunk; ``values`` v / d.
        key_gate: decay over keys, or None.
        value_gate: decay over values, or None.
        beta: (b, C, 1).
        output_factor: d times the scale.
        total: (b, K or 1, 1) decay of the state over each chunk, or None.
        totals: ``total`` by step, or None.
        q, k: (b, C, K) undecayed, where keys decay exactly; else None.
    """

    buffers: DeltaBuffers
    key_gate: Gate | None
    value_gate: Gate | None
    beta: Tensor
    output_factor: Tensor
    total: Tensor | None
    totals: tuple[Tensor, ...] | None
    q: Tensor | None
    k: Tensor | None


class DeltaWrites(NamedTuple):
    """What the rows of one span wrote.

    Attributes:
        query_pairs: (b, C, C) P.
        inverse: (b, C, C) that of I + A.
        written: (b, C, V) u.
    """

    query_pairs: Tensor
    inverse: Tensor
    written: Tensor


def _lay_out(x: InputChunks, span: ChunkSpan, work: Scratch) -> DeltaBuffers:
    sizes, chunk, (key_dim, value_dim) = span.sizes(x.heads), x.plan.chunk, x.state_shape
    count = sum(sizes)
    read = work.take("read", count, 2 * chunk, key_dim)
    queries, erasing = halves(read)
    write = erasing if x.key_decay is None else work.take("write", *erasing.shape)
    decays = x.key_decay is not None or x.value_decay is not None
    carry = work.take("carry", *write.shape) if decays and not x.exact else write
    pairs = work.take("pairs", count, 2 * chunk, chunk)
    erase = work.take("erase", *erasing.shape)
    return DeltaBuffers(
        read,
        queries,
        erasing,
        write,
        carry,
        erase,
        work.take("values", count, chunk, value_dim),
        pairs,
        *halves(pairs),
        work.take("pairs", count, chunk, chunk),
        work.take("weights", count, chunk, chunk),
        split_states(work.take("states", span.states(x.heads), key_dim, value_dim), span, x.heads),
        erase.split_with_sizes(sizes),
        carry.mT.split_with_sizes(sizes),
    )


def load_rows(x: InputChunks, span: ChunkSpan, work: Scratch) -> DeltaRows:
    """Load and decay the rows of a span."""
    lead, sizes = span.lead, span.sizes(x.heads)
    key_gate, value_gate = x.key_gate(lead), x.value_gate(lead)
    m = work.once("delta", sizes, lambda: _lay_out(x, span, work))
    queries, keys = x.q[lead], x.k[lead]
    factor = key_gate.read if key_gate else None
    load(queries, x.dtype, factor, m.queries)
    load(keys, x.dtype, factor, m.erasing)
    load(x.v[lead].squeeze(4), x.dtype, value_gate.write if value_gate else None, m.values)
    total = q = k = None
    if key_gate:
        load(keys, x.dtype, key_gate.write, m.write)
        total = key_gate.total[..., None]
        if x.exact:
            q, k = load(queries, x.dtype), load(keys, x.dtype)
    elif value_gate:
        total = value_gate.total[..., None]
    if total is not None and not x.exact:
        # Rescaled rows are relative to the chunk's start; what they write decays to its end.
        torch.mul(m.write, total.mT, out=m.carry)
    return DeltaRows(
        m,
        key_gate,
        value_gate,
        x.span_beta(lead),
        value_gate.output if value_gate else x.scale_tensor,
        total,
        None if total is None else total.split_with_sizes(sizes),
        q,
        k,
    )


def _all_pairs(x: InputChunks, rows: DeltaRows) -> tuple[Tensor, Tensor]:
    """Return P, and A below the diagonal of memory that holds anything elsewhere."""
    if x.exact_keys:
        return exact_pairs(rows)
    m = rows.buffers
    torch.bmm(m.read, m.write.mT, out=m.pairs)
    return m.query_pairs.tril_(), torch.mul(m.erasing_pairs, rows.beta, out=m.weights)


def _query_pairs(x: InputChunks, rows: DeltaRows) -> Tensor:
    """Return P."""
    if x.exact_keys:
        return exact_pairs(rows)[0]
    m = rows.buffers
    return torch.bmm(m.queries, m.write.mT, out=m.own_pairs).tril_()


def exact_reads(rows: DeltaRows) -> Tensor:
    """Return undecayed queries and beta times undecayed keys, (b, 2, C, K)."""
    assert rows.q is not None
    return torch.stack([rows.q, rows.beta * rows.k], dim=1)


def exact_pairs(rows: DeltaRows) -> tuple[Tensor, Tensor]:
    """Return P and A where keys decay exactly."""
    assert rows.q is not None
    assert rows.k is not None
    assert rows.key_gate is not None
    pairs = key_pairs(exact_reads(rows), rows.k, rows.key_gate.g, exclusive=False)
    query_pairs, strict = pairs.unbind(1)
    query_pairs.diagonal(dim1=1, dim2=2).copy_((rows.q * rows.k).sum(-1))
    return query_pairs, strict.contiguous()


def _weigh(rows: DeltaRows, inverse: Tensor) -> Tensor:
    """Return the inverse times beta; fill ``erase``, that times the erasing keys."""
    m = rows.buffers
    weights = torch.mul(inverse, rows.beta.mT, out=m.weights)
    torch.bmm(weights, m.erasing, out=m.erase)
    return weights


def recall(x: InputChunks, rows: DeltaRows, span: ChunkSpan, saved: Saved) -> DeltaWrites:
    """Return what the rows of a span wrote, and fill its states, in the backward pass."""
    m = rows.buffers
    written, inverse = saved.delta(span)
    query_pairs = _query_pairs(x, rows)
    _weigh(rows, inverse)
    carry, states = StateCarry.again(saved.before(span), x.plan), m.states
    carry.enter(states.step_starts[0])
    torch.bmm(m.carry.mT, written, out=states.ends)
    accumulate(states.step_starts, states.step_ends, carry, rows.totals)
    return DeltaWrites(query_pairs, inverse, written)


def delta_forward(
    x: InputChunks,
    span: ChunkSpan,
    carry: StateCarry,
    saved: Saved | None,
    work: Scratch,
    out: Tensor,
) -> None:
    """Compute the output of one span; arguments as for ``additive_forward``."""
    rows = load_rows(x, span, work)
    m = rows.buffers
    if saved is None:
        written, inverse = (
            work.take("written", *m.values.shape),
            work.take("inverse", *m.weights.shape),
        )
    else:
        carry.enter(saved.before(span))
        written, inverse = saved.delta(span)
    query_pairs, strict = _all_pairs(x, rows)
    unit_lower_inverse(strict, inverse)
    weights = _weigh(rows, inverse)
    torch.bmm(weights, m.values, out=written)
    _pass_states(rows, written.split_with_sizes(span.sizes(x.heads)), carry)
    # The values have been used; their memory is still in the cache.
    o = torch.bmm(query_pairs, written, out=m.values)
    store(out.squeeze(4), o.baddbmm_(m.queries, m.states.starts), rows.output_factor)


def _pass_states(rows: DeltaRows, step_written: tuple[Tensor, ...], carry: StateCarry) -> None:
    """Fill the states of a span from those that enter it; subtract from u what it erases."""
    m = rows.buffers
    erase, write, totals = m.step_erase, m.step_carry, rows.totals
    carry.enter(m.states.step_starts[0])
    for i, start, end in walk(m.states.step_starts, m.states.step_ends, carry):
        u = step_written[i].baddbmm_(erase[i], start, alpha=-1)
        if totals is None:
            torch.baddbmm(start, write[i], u, out=end)
        else:
            torch.mul(start, totals[i], out=end)
            end.baddbmm_(write[i], u)
