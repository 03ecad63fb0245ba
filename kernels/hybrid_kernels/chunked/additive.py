"""Chunked linear attention, additive form: the forward pass of one span of chunks.

Within a chunk, with w the rows that write, S the state before the chunk and D its decay over the
chunk::

    A = lower(q w^T)          each pair decayed (gates.py, pairs.py)
    o = A v + q S
    S' = D S + w^T v          with w decayed to the chunk's end

Shapes: B batch, T time, C chunk, b chunks x G of one span, G heads of q and k, r value heads per G,
H = G r heads of the state, K key dim, V value dim, N sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.chunked.chunk_plan import ChunkSpan
from hybrid_kernels.chunked.gates import Gate
from hybrid_kernels.chunked.inputs import InputChunks
from hybrid_kernels.chunked.memory import Scratch, load, store
from hybrid_kernels.chunked.pairs import apply_pairs, key_pairs
from hybrid_kernels.chunked.saved import Saved
from hybrid_kernels.chunked.state_walk import SpanStates, StateCarry, accumulate, split_states


class AdditiveBuffers(NamedTuple):
    """Memory for one span, laid out once for all spans of one shape.

    Each of ``read``, ``write`` and ``values`` is a pair of views, as chunks (leading, sequences, G,
    C, ...) and as products take them.

    Attributes:
        read, write: (b, C, K).
        values: (b, C, r V).
        output: (b, C, r V), in the memory of ``write``.
        pairs: (b, C, C).
        states: around each chunk, unless those of every chunk are saved.
    """

    read: tuple[Tensor, Tensor]
    write: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]
    output: Tensor
    pairs: Tensor
    states: SpanStates


class DecayFactors(NamedTuple):
    """What decays multiply in one span.

    Attributes:
        key_gate: decay over keys, or None.
        value_gate: decay over values, or None.
        write: factor of values, (leading, sequences, G, C, r, V or 1), or None.
        output: factor of the output, the scale included, or None.
        total: (b, K or 1, r V or 1) decay of the state over each chunk, or None.
        totals: ``total`` by step, or None.
    """

    key_gate: Gate | None
    value_gate: Gate | None
    write: Tensor | None
    output: Tensor | None
    total: Tensor | None
    totals: tuple[Tensor, ...] | None


class AdditiveRows(NamedTuple):
    """The rows of one span, loaded and decayed.

    Attributes:
        buffers: the memory they are in.
        decay: what decays multiply.
        read: (b, C, K) queries times their read factor.
        write: (b, C, K) keys times their write factor.
        values: (b, C, r V) values times ``write_factor``.
        write_scale: (leading, sequences, G, C, r, 1), or None.
        write_factor: ``decay.write`` times ``write_scale``, or None.
        q, k: (b, C, K) undecayed; None unless the diagonal of the pairs is computed by itself.
        bonus: (b, 1, K), or None.
    """

    buffers: AdditiveBuffers
    decay: DecayFactors
    read: Tensor
    write: Tensor
    values: Tensor
    write_scale: Tensor | None
    write_factor: Tensor | None
    q: Tensor | None = None
    k: Tensor | None = None
    bonus: Tensor | None = None


def _lay_out(x: InputChunks, span: ChunkSpan, work: Scratch) -> AdditiveBuffers:
    def both(name: str, chunks: Tensor) -> tuple[Tensor, Tensor]:
        memory = work.take(name, *chunks[span.lead].shape)
        return memory, memory.flatten(0, 2).flatten(2)

    read, write, values = both("read", x.q), both("write", x.k), both("values", x.v)
    count, chunk, _ = values[1].shape
    states = work.take("states", span.states(x.heads), *x.state_shape)
    return AdditiveBuffers(
        read,
        write,
        values,
        work.take("write", *values[1].shape),
        work.take("pairs", count, chunk, chunk),
        split_states(states, span, x.heads),
    )


def load_rows(x: InputChunks, span: ChunkSpan, work: Scratch) -> AdditiveRows:
    """Load and decay the rows of a span."""
    lead, sizes = span.lead, span.sizes(x.heads)
    m = work.once("additive", sizes, lambda: _lay_out(x, span, work))
    if x.fixed_decay:
        decay = work.once("decay", sizes, lambda: _decay_factors(x, span))
    else:
        decay = _decay_factors(x, span)
    write_scale, write_factor = None, decay.write
    if x.write_scale is not None:
        write_scale = x.write_scale[lead].to(x.dtype)
        write_factor = write_scale if write_factor is None else write_factor * write_scale
    q = k = bonus = None
    if x.exact_keys or x.bonus is not None:
        q, k = load(x.q[lead], x.dtype), load(x.k[lead], x.dtype)
    if x.bonus is not None:
        bonus = x.bonus.to(x.dtype).repeat(sum(sizes) // x.heads, 1)[:, None]
    gate = decay.key_gate
    read = _gather(x.q[lead], gate.read if gate else None, m.read)
    write = _gather(x.k[lead], gate.write if gate else None, m.write)
    values = _gather(x.v[lead], write_factor, m.values)
    return AdditiveRows(m, decay, read, write, values, write_scale, write_factor, q, k, bonus)


def _decay_factors(x: InputChunks, span: ChunkSpan) -> DecayFactors:
    key_gate, value_gate = x.key_gate(span.lead), x.value_gate(span.lead)
    write, output = None, None if x.scale == 1.0 else x.scale_tensor
    total = key_gate.total[:, :, None] if key_gate else None
    if value_gate:
        shared, size = x.v.shape[4:]
        shape = (-1, *x.v.shape[1:5], value_gate.g.shape[2] // shared)
        write, output = value_gate.write.view(shape), value_gate.output.view(shape)
        columns = value_gate.total[:, None]
        if columns.shape[2] not in (1, shared * size):
            columns = columns[..., None].expand(-1, -1, -1, size).flatten(2)
        total = columns if total is None else total * columns
    totals = None if total is None else total.split_with_sizes(span.sizes(x.heads))
    return DecayFactors(key_gate, value_gate, write, output, total, totals)


def _gather(chunks: Tensor, factor: Tensor | None, memory: tuple[Tensor, Tensor]) -> Tensor:
    """Load chunks times ``factor`` as (b, C, K or r V); a view of the input where that is free."""
    as_chunks, rows = memory
    if factor is None and chunks.dtype == rows.dtype and chunks.is_contiguous():
        return chunks.flatten(0, 2).flatten(2)
    load(chunks, rows.dtype, factor, as_chunks)
    return rows


def raw_values(x: InputChunks, rows: AdditiveRows, span: ChunkSpan) -> Tensor:
    """Return the values without decay, times ``write_scale``, (b, C, r V)."""
    return load(x.v[span.lead], x.dtype, rows.write_scale).flatten(2)


def decayed_pairs(x: InputChunks, rows: AdditiveRows) -> Tensor:
    """Return the products of reading and writing rows, decayed over keys and masked, (b, C, C)."""
    if x.exact_keys:
        assert rows.q is not None
        assert rows.k is not None
        assert rows.decay.key_gate is not None
        exclusive = x.bonus is not None
        pairs = key_pairs(rows.q[:, None], rows.k, rows.decay.key_gate.g, exclusive).flatten(1, 2)
    else:
        pairs = torch.bmm(rows.read, rows.write.mT, out=rows.buffers.pairs)
        # Not as a product with zeros, which would keep NaN and inf of later keys.
        pairs.tril_(0 if x.bonus is None else -1)
    if rows.q is not None:
        assert rows.k is not None
        q = rows.q if rows.bonus is None else rows.q * rows.bonus
        pairs.diagonal(dim1=1, dim2=2).copy_((q * rows.k).sum(-1))
    return pairs


def _pass_states(x: InputChunks, rows: AdditiveRows, states: SpanStates, carry: StateCarry) -> None:
    """Fill the states of a span from those that enter it."""
    carry.enter(states.step_starts[0])
    # What each chunk adds lies where the state after it will.
    torch.bmm(rows.write.mT, rows.values, out=states.ends)
    if rows.decay.total is not None and not x.exact:
        # Rescaled rows are relative to the chunk's start; what they write decays to its end.
        states.ends.mul_(rows.decay.total)
    accumulate(states.step_starts, states.step_ends, carry, rows.decay.totals)


def _state_memory(
    x: InputChunks, rows: AdditiveRows, span: ChunkSpan, saved: Saved | None
) -> SpanStates:
    if saved is not None and saved.every_chunk:
        return split_states(saved.states(span), span, x.heads)
    return rows.buffers.states


def recall_states(x: InputChunks, rows: AdditiveRows, span: ChunkSpan, saved: Saved) -> SpanStates:
    """Return the states of a span in the backward pass."""
    states = _state_memory(x, rows, span, saved)
    if not saved.every_chunk:
        _pass_states(x, rows, states, StateCarry.again(saved.before(span), x.plan))
    return states


def additive_forward(
    x: InputChunks,
    span: ChunkSpan,
    carry: StateCarry,
    saved: Saved | None,
    work: Scratch,
    out: Tensor,
) -> None:
    """Compute the output of one span.

    Args:
        x: the inputs.
        span: which chunks.
        carry: the states before the span; becomes those after it.
        saved: filled for the backward pass, or None.
        work: memory that every span overwrites.
        out: (leading, sequences, G, C, r, V) the span's output, to be filled.
    """
    rows = load_rows(x, span, work)
    states = _state_memory(x, rows, span, saved)
    if saved is not None and not saved.every_chunk:
        carry.enter(saved.before(span))
    _pass_states(x, rows, states, carry)
    pairs = decayed_pairs(x, rows)
    if not x.exact_values:
        # The writing rows have been used; their memory is still in the cache.
        o = torch.bmm(pairs, rows.values, out=rows.buffers.output)
        store(out, o.baddbmm_(rows.read, states.starts), rows.decay.output)
        return
    assert rows.decay.value_gate is not None
    values = raw_values(x, rows, span)
    own = apply_pairs(pairs, values, rows.decay.value_gate.g)
    own.addcmul_(pairs.diagonal(dim1=1, dim2=2)[..., None], values)
    o = torch.bmm(rows.read, states.starts).mul_(rows.decay.value_gate.read)
    store(out, o.add_(own).mul_(x.scale))
