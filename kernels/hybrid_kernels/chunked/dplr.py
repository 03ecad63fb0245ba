"""A diagonal plus low rank transition in chunks: the forward pass of one span of chunks.

Within a chunk, with e the rows of ``erase_query``, a those of ``erase_key`` and w those of k, S the
state before the chunk and D its decay over the chunk::

    [Pa Pw] = lower(q [a; w]^T),  [A W] = strictly lower(e [a; w]^T)       each pair decayed
    y = (I - A)^-1 (W v + e S)                what each erase query reads
    o = (Pa y + Pw v + q S) scale
    S' = D S + D [a; w]^T [y; v]

The recurrence is that of RWKV-7 (arXiv 2503.14456, eq. 16), and its chunked form the delta rule's
(``delta.py``), in which a and w are the same rows up to a factor.

Shapes: as in ``additive.py``; r is 1. All decays are over keys.
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


class DplrBuffers(NamedTuple):
    """Memory for the rows of one span, laid out once for all spans of one shape.

    Attributes:
        read: (b, 2 C, K), split in ``queries`` and ``erasing``.
        write: (b, 2 C, K), split in rows of ``erase_key`` and of k.
        carry: ``write`` unless rows are rescaled; split in ``carry_erased`` and ``carry_keys``.
        erase: (b, C, K) the inverse times ``erasing``.
        values: (b, C, V).
        output: (b, C, V).
        pairs: (b, 2 C, 2 C) of ``read`` and ``write``.
        strict: (b, C, C).
        states: around each chunk.
        step_erase, step_carry: ``erase`` and the transpose of ``carry_erased`` by step.
    """

    read: Tensor
    queries: Tensor
    erasing: Tensor
    write: Tensor
    carry: Tensor
    carry_erased: Tensor
    carry_keys: Tensor
    erase: Tensor
    values: Tensor
    output: Tensor
    pairs: Tensor
    strict: Tensor
    states: SpanStates
    step_erase: tuple[Tensor, ...]
    step_carry: tuple[Tensor, ...]


class DplrRows(NamedTuple):
    """The rows of one span, loaded and decayed into ``buffers``.

    Attributes:
        buffers: ``read`` holds queries and erase queries, ``write`` erase keys and keys as they are
            paired, ``carry`` the latter as they reach the end of the chunk.
        gate: decay over keys, or None.
        total: (b, K or 1, 1) decay of the state over each chunk, or None.
        totals: ``total`` by step, or None.
        plain_read, plain_write: (b, 2, C, K) undecayed ``read`` and ``write`` where keys decay
            exactly; else None.
    """

    buffers: DplrBuffers
    gate: Gate | None
    total: Tensor | None
    totals: tuple[Tensor, ...] | None
    plain_read: Tensor | None
    plain_write: Tensor | None


class DplrPairs(NamedTuple):
    """Products of reading and writing rows, decayed and masked; each (b, C, C).

    Attributes:
        query_erased: Pa.
        query_keys: Pw.
        erasing_erased: A, in memory of which the upper triangle may hold anything.
        erasing_keys: W.
    """

    query_erased: Tensor
    query_keys: Tensor
    erasing_erased: Tensor
    erasing_keys: Tensor


def _lay_out(x: InputChunks, span: ChunkSpan, work: Scratch) -> DplrBuffers:
    sizes, chunk, (key_dim, value_dim) = span.sizes(x.heads), x.plan.chunk, x.state_shape
    count = sum(sizes)
    read = work.take("read", count, 2 * chunk, key_dim)
    write = work.take("write", count, 2 * chunk, key_dim)
    rescaled = x.key_decay is not None and not x.exact
    carry = work.take("carry", *write.shape) if rescaled else write
    carry_erased, carry_keys = halves(carry)
    erase = work.take("erase", count, chunk, key_dim)
    return DplrBuffers(
        read,
        *halves(read),
        write,
        carry,
        carry_erased,
        carry_keys,
        erase,
        work.take("values", count, chunk, value_dim),
        work.take("output", count, chunk, value_dim),
        work.take("pairs", count, 2 * chunk, 2 * chunk),
        work.take("strict", count, chunk, chunk),
        split_states(work.take("states", span.states(x.heads), key_dim, value_dim), span, x.heads),
        erase.split_with_sizes(sizes),
        carry_erased.mT.split_with_sizes(sizes),
    )


def load_rows(x: InputChunks, span: ChunkSpan, work: Scratch) -> DplrRows:
    """Load and decay the rows of a span."""
    lead, sizes = span.lead, span.sizes(x.heads)
    assert x.erase_key is not None
    assert x.erase_query is not None
    gate = x.key_gate(lead)
    m = work.once("dplr", sizes, lambda: _lay_out(x, span, work))
    reads, writes = (x.q[lead], x.erase_query[lead]), (x.erase_key[lead], x.k[lead])
    for rows, out in zip(reads, halves(m.read), strict=True):
        load(rows, x.dtype, gate.read if gate else None, out)
    for rows, out in zip(writes, halves(m.write), strict=True):
        load(rows, x.dtype, gate.write if gate else None, out)
    load(x.v[lead].squeeze(4), x.dtype, None, m.values)
    if gate is None:
        return DplrRows(m, None, None, None, None, None)
    total, plain_read, plain_write = gate.total[..., None], None, None
    if x.exact:
        plain_read = torch.stack([load(rows, x.dtype) for rows in reads], dim=1)
        plain_write = torch.stack([load(rows, x.dtype) for rows in writes], dim=1)
    else:
        # Rescaled rows are relative to the chunk's start; what they write decays to its end.
        torch.mul(m.write, total.mT, out=m.carry)
    return DplrRows(m, gate, total, total.split_with_sizes(sizes), plain_read, plain_write)


def all_pairs(x: InputChunks, rows: DplrRows) -> DplrPairs:
    """Return the products of all reading with all writing rows."""
    if x.exact_keys:
        return _exact_pairs(rows)
    m = rows.buffers
    torch.bmm(m.read, m.write.mT, out=m.pairs)
    (query_erased, query_keys), (erasing_erased, erasing_keys) = quarters(m.pairs)
    query_erased.tril_()
    query_keys.tril_()
    erasing_keys.tril_(-1)
    return DplrPairs(query_erased, query_keys, erasing_erased, erasing_keys)


def quarters(pairs: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the four (b, C, C) of (b, 2 C, 2 C), by row."""
    chunk = pairs.shape[1] // 2
    upper, lower = halves(pairs)
    return (upper[..., :chunk], upper[..., chunk:]), (lower[..., :chunk], lower[..., chunk:])


def _exact_pairs(rows: DplrRows) -> DplrPairs:
    """Return the pairs where keys decay exactly."""
    assert rows.plain_read is not None
    assert rows.plain_write is not None
    assert rows.gate is not None
    parts = []
    for write in rows.plain_write.unbind(1):
        pairs = key_pairs(rows.plain_read, write, rows.gate.g, exclusive=False)
        # A query reads what its own token writes, whatever the decay.
        own = (rows.plain_read[:, 0] * write).sum(-1)
        pairs[:, 0].diagonal(dim1=1, dim2=2).copy_(own)
        parts.append(pairs)
    (query_erased, erasing_erased), (query_keys, erasing_keys) = (p.unbind(1) for p in parts)
    return DplrPairs(query_erased, query_keys, erasing_erased, erasing_keys)


def recall(
    x: InputChunks, rows: DplrRows, span: ChunkSpan, saved: Saved
) -> tuple[DplrPairs, Tensor, Tensor]:
    """Return pairs, inverse and y of a span, and fill its states, in the backward pass."""
    m = rows.buffers
    read, inverse = saved.delta(span)
    pairs = all_pairs(x, rows)
    torch.bmm(inverse, m.erasing, out=m.erase)
    carry, states = StateCarry.again(saved.before(span), x.plan), m.states
    carry.enter(states.step_starts[0])
    torch.bmm(m.carry_keys.mT, m.values, out=states.ends)
    states.ends.baddbmm_(m.carry_erased.mT, read)
    accumulate(states.step_starts, states.step_ends, carry, rows.totals)
    return pairs, inverse, read


def dplr_forward(
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
        read = work.take("written", *m.values.shape)
        inverse = work.take("inverse", *m.strict.shape)
    else:
        carry.enter(saved.before(span))
        read, inverse = saved.delta(span)
    pairs = all_pairs(x, rows)
    unit_lower_inverse(torch.neg(pairs.erasing_erased, out=m.strict), inverse)
    torch.bmm(inverse, m.erasing, out=m.erase)
    torch.bmm(inverse, torch.bmm(pairs.erasing_keys, m.values, out=m.output), out=read)
    _pass_states(rows, read.split_with_sizes(span.sizes(x.heads)), carry)
    o = torch.bmm(pairs.query_erased, read, out=m.output)
    o.baddbmm_(pairs.query_keys, m.values).baddbmm_(m.queries, m.states.starts)
    store(out.squeeze(4), o, x.scale_tensor)


def _pass_states(rows: DplrRows, step_read: tuple[Tensor, ...], carry: StateCarry) -> None:
    """Fill the states of a span from those that enter it; add to y what it reads of them."""
    m, totals = rows.buffers, rows.totals
    carry.enter(m.states.step_starts[0])
    # What keys and values add lies where the state after the chunk will.
    torch.bmm(m.carry_keys.mT, m.values, out=m.states.ends)
    for i, start, end in walk(m.states.step_starts, m.states.step_ends, carry):
        y = step_read[i].baddbmm_(m.step_erase[i], start)
        if totals is None:
            end.add_(start)
        else:
            end.addcmul_(start, totals[i])
        end.baddbmm_(m.step_carry[i], y)
