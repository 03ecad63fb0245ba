"""Backward pass of one span of the additive form; the formulas of ``additive.py`` transposed.

The gradients of queries, keys and values are stored one after the other, while what they were made
of is in the cache. Each factor of a decay contributes the sum of a row times its gradient.

Shapes: as in ``additive.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.chunked.additive import (
    AdditiveRows,
    decayed_pairs,
    load_rows,
    raw_values,
    recall_states,
)
from hybrid_kernels.chunked.chunk_plan import ChunkSpan
from hybrid_kernels.chunked.gradients import ChunkGradients
from hybrid_kernels.chunked.inputs import InputChunks
from hybrid_kernels.chunked.memory import Scratch, load, store
from hybrid_kernels.chunked.pairs import apply_pairs_backward, key_pairs_backward
from hybrid_kernels.chunked.saved import Saved
from hybrid_kernels.chunked.state_walk import SpanStates, StateCarry, split_states, walk_back


class PairGradients(NamedTuple):
    """Gradients through the pairs of rows.

    Attributes:
        pairs: (b, C, C) gradient of the pairs, masked; not used where keys decay exactly.
        diagonal: (b, C, 1) that of the diagonal where it is computed by itself, or None.
        read, write, key_decay: with exact keys, gradients by the pairs of q, k and the log decay.
        values, value_decay: with exact values, gradients by the pairs of v and the log decay.
    """

    pairs: Tensor
    diagonal: Tensor | None = None
    read: Tensor | None = None
    write: Tensor | None = None
    key_decay: Tensor | None = None
    values: Tensor | None = None
    value_decay: Tensor | None = None


class DecayTerms(NamedTuple):
    """Factors of the decays times their gradients.

    Attributes:
        reads: reading rows times their gradient, (b, C, K), or (b, C, 1) without a gate over keys;
            None if not needed.
        writes: writing rows times their gradient, (b, C, K); None without a gate over keys.
        output: the output times its gradient, (b, C, r V or r); None if it was not saved.
        key_total: (b, K or 1) total decay over keys, or None.
        value_total: (b, r V or 1) total decay over values, or None.
    """

    reads: Tensor | None
    writes: Tensor | None
    output: Tensor | None
    key_total: Tensor | None
    value_total: Tensor | None


def additive_backward(
    x: InputChunks,
    span: ChunkSpan,
    carry: StateCarry,
    saved: Saved,
    work: Scratch,
    output: Tensor | None,
    grad_output: Tensor,
    grads: ChunkGradients,
) -> None:
    """Compute the gradients of one span.

    Args:
        x: the inputs.
        span: which chunks.
        carry: gradient of the states after the span; becomes that of those before it.
        saved: what the forward pass saved.
        work: memory that every span overwrites.
        output: (leading, sequences, G, C, r, V), or None to compute it again where it is needed.
        grad_output: its gradient, of the same shape.
        grads: of the span, to be filled.
    """
    rows = load_rows(x, span, work)
    states = recall_states(x, rows, span, saved)
    do = work.take("do", *rows.values.shape)
    load(grad_output, x.dtype, rows.decay.output, do)
    o_do = None
    if output is not None and rows.decay.value_gate and not x.exact:
        o_do = work.take("dtotal" if _scalar(x) else "o_do", *do.shape)
        torch.mul(output, grad_output, out=o_do.view(output.shape))
        o_do = _over_values(x, o_do)
    dstates = _pass_states_back(x, rows, span, do, carry, work)
    key_total, value_total = _total_gradients(x, rows, states, dstates, grads.of_decays, work)
    if rows.decay.total is not None and not x.exact:
        # What rescaled rows write decays to the chunk's end.
        dstates.ends.mul_(rows.decay.total)
    dpairs = _pair_gradients(x, rows, span, do, grad_output, work)
    reads = _store_queries(x, rows, states, do, dpairs, grads, work)
    writes = _store_keys(x, rows, dstates, dpairs, grads, work)
    pairs = None if x.exact_values else decayed_pairs(x, rows)
    dvalues = _store_values(x, rows, dstates, do, dpairs, pairs, grads, work)
    if grads.bonus is not None:
        _add_bonus(x, rows, dpairs, grads.bonus)
    terms = DecayTerms(reads, writes, o_do, key_total, value_total)
    if grads.key_decay is not None:
        _store_key_decay(rows, dpairs, terms, grads.key_decay)
    if grads.value_decay is not None or grads.write_scale is not None:
        written = _store_write_scale(x, rows, span, dvalues, dpairs, grads.write_scale)
        if grads.value_decay is not None:
            read = _value_reads(x, rows, states, pairs, do, terms, work)
            _store_value_decay(x, rows, read, written, dpairs, terms, grads.value_decay)


def _pass_states_back(
    x: InputChunks,
    rows: AdditiveRows,
    span: ChunkSpan,
    do: Tensor,
    carry: StateCarry,
    work: Scratch,
) -> SpanStates:
    """Return the gradients of the states around each chunk."""

    def lay_out() -> SpanStates:
        memory = work.take("dstates", span.states(x.heads), *x.state_shape)
        return split_states(memory, span, x.heads)

    dstates = work.once("dstates", span.sizes(x.heads), lay_out)
    carry.enter(dstates.step_ends[-1])
    # What each chunk's reads add lies where the gradient before it will.
    torch.bmm(rows.read.mT, do, out=dstates.starts)
    for i, after, before in walk_back(dstates.step_starts, dstates.step_ends, carry):
        if rows.decay.totals is None:
            before.add_(after)
        else:
            before.addcmul_(after, rows.decay.totals[i])
    return dstates


def _total_gradients(
    x: InputChunks,
    rows: AdditiveRows,
    states: SpanStates,
    dstates: SpanStates,
    wanted: bool,
    work: Scratch,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the total decays over keys and over values times their gradients.

    Rescaled, the whole state after the chunk goes through the total decay; exact, only the state
    before it does.
    """
    if rows.decay.total is None or not wanted:
        return None, None
    if x.exact:
        dtotal = (states.starts * dstates.ends).mul_(rows.decay.total)
    else:
        memory = work.take("dtotal", *dstates.ends.shape)
        dtotal = torch.mul(states.ends, dstates.ends, out=memory)
    return (
        dtotal.sum(2) if rows.decay.key_gate else None,
        dtotal.sum(1) if rows.decay.value_gate else None,
    )


def _pair_gradients(
    x: InputChunks,
    rows: AdditiveRows,
    span: ChunkSpan,
    do: Tensor,
    grad_output: Tensor,
    work: Scratch,
) -> PairGradients:
    found: dict[str, Tensor] = {}
    if x.exact_values:
        found = _exact_value_pairs(x, rows, span, grad_output, work)
        dpairs = found.pop("pairs")
    else:
        count, chunk, _ = do.shape
        dpairs = torch.bmm(do, rows.values.mT, out=work.take("pairs", count, chunk, chunk))
    if rows.q is not None:
        found["diagonal"] = dpairs.diagonal(dim1=1, dim2=2)[..., None].clone()
    if not x.exact_keys:
        return PairGradients(dpairs.tril_(0 if x.bonus is None else -1), **found)
    assert rows.q is not None
    assert rows.k is not None
    assert rows.decay.key_gate is not None
    q, exclusive = rows.q[:, None], x.bonus is not None
    dread, dwrite, ddecay = key_pairs_backward(
        dpairs[:, None], q, rows.k, rows.decay.key_gate.g, exclusive
    )
    return PairGradients(dpairs, read=dread[:, 0], write=dwrite, key_decay=ddecay, **found)


def _exact_value_pairs(
    x: InputChunks, rows: AdditiveRows, span: ChunkSpan, grad_output: Tensor, work: Scratch
) -> dict[str, Tensor]:
    assert rows.decay.value_gate is not None
    do = load(grad_output, x.dtype).flatten(2) * x.scale
    pairs, values = decayed_pairs(x, rows), raw_values(x, rows, span)
    dpairs, dvalues, ddecay = apply_pairs_backward(do, pairs, values, rows.decay.value_gate.g)
    dvalues.addcmul_(pairs.diagonal(dim1=1, dim2=2)[..., None], do)
    dpairs.diagonal(dim1=1, dim2=2).copy_((do * values).sum(-1))
    return {"pairs": dpairs, "values": dvalues, "value_decay": ddecay}


def _store_queries(
    x: InputChunks,
    rows: AdditiveRows,
    states: SpanStates,
    do: Tensor,
    dpairs: PairGradients,
    grads: ChunkGradients,
    work: Scratch,
) -> Tensor | None:
    """Store the gradient of q; return ``DecayTerms.reads``."""
    gate = rows.decay.key_gate
    dread = torch.bmm(do, states.starts.mT, out=work.take("dread", *rows.read.shape))
    if not x.exact_keys:
        dread.baddbmm_(dpairs.pairs, rows.write)
    factor = gate.read if gate else None
    _store_row(grads.q, dread, factor, dpairs.read, dpairs.diagonal, rows.k, rows.bonus)
    if not grads.of_decays or not (gate or x.v.shape[4] == 1):
        return None
    reads = dread.mul_(rows.read)
    return reads if gate else reads.sum(-1, keepdim=True)


def _store_keys(
    x: InputChunks,
    rows: AdditiveRows,
    dstates: SpanStates,
    dpairs: PairGradients,
    grads: ChunkGradients,
    work: Scratch,
) -> Tensor | None:
    """Store the gradient of k; return ``DecayTerms.writes``."""
    gate = rows.decay.key_gate
    memory = work.take("dwrite" if gate else "dread", *rows.write.shape)
    dwrite = torch.bmm(rows.values, dstates.ends.mT, out=memory)
    if not x.exact_keys:
        dwrite.baddbmm_(dpairs.pairs.mT, rows.read)
    factor = gate.write if gate else None
    _store_row(grads.k, dwrite, factor, dpairs.write, dpairs.diagonal, rows.q, rows.bonus)
    return dwrite.mul_(rows.write) if gate and grads.of_decays else None


def _store_row(
    chunks: Tensor,
    grad: Tensor,
    factor: Tensor | None,
    by_pairs: Tensor | None,
    ddiagonal: Tensor | None,
    other: Tensor | None,
    bonus: Tensor | None,
) -> None:
    """Store the gradient of q or k in ``chunks``.

    ``grad``, which is left as it is, belongs to the rows times ``factor``. Exact pairs add
    ``by_pairs``, and the diagonal its gradient times the ``other`` rows times ``bonus``.
    """
    if ddiagonal is None:
        store(chunks, grad, factor)
        return
    assert other is not None
    grad = grad if factor is None else grad * factor
    if by_pairs is not None:
        grad = grad + by_pairs
    store(chunks, torch.addcmul(grad, ddiagonal, other if bonus is None else other * bonus))


def _store_values(
    x: InputChunks,
    rows: AdditiveRows,
    dstates: SpanStates,
    do: Tensor,
    dpairs: PairGradients,
    pairs: Tensor | None,
    grads: ChunkGradients,
    work: Scratch,
) -> Tensor:
    """Store the gradient of v; return that of the decayed values, (b, C, r V).

    With exact values, the result is without the part by the pairs.
    """
    dvalues = torch.bmm(rows.write, dstates.ends, out=work.take("dtotal", *rows.values.shape))
    if pairs is not None:
        store(grads.v, dvalues.baddbmm_(pairs.mT, do), rows.write_factor)
        return dvalues
    assert rows.decay.value_gate is not None
    assert dpairs.values is not None
    dv = torch.addcmul(dpairs.values, dvalues, rows.decay.value_gate.write)
    store(grads.v, dv, rows.write_scale)
    return dvalues


def _add_bonus(x: InputChunks, rows: AdditiveRows, dpairs: PairGradients, dbonus: Tensor) -> None:
    assert dpairs.diagonal is not None
    assert rows.q is not None
    by_chunk = (dpairs.diagonal * rows.q * rows.k).sum(1)
    dbonus += by_chunk.unflatten(0, (-1, x.heads)).sum(0)


def _store_key_decay(
    rows: AdditiveRows, dpairs: PairGradients, terms: DecayTerms, chunks: Tensor
) -> None:
    gate, (reads, writes, _, total, _) = rows.decay.key_gate, terms
    assert gate is not None
    assert reads is not None
    assert writes is not None
    assert total is not None
    if gate.read.shape[2] == 1:
        reads, writes, total = (y.sum(-1, keepdim=True) for y in (reads, writes, total))
    dg = gate.backward(reads, writes, total)
    store(chunks, dg if dpairs.key_decay is None else dg.add_(dpairs.key_decay))


def _store_write_scale(
    x: InputChunks,
    rows: AdditiveRows,
    span: ChunkSpan,
    dvalues: Tensor,
    dpairs: PairGradients,
    chunks: Tensor | None,
) -> Tensor:
    """Store the gradient of ``write_scale``, if there is one; give up ``dvalues``.

    Returns:
        (b, C, r V or r) the write factor of the value gate times its gradient.
    """
    if chunks is None:
        return _over_values(x, dvalues.mul_(rows.values))
    raw, gate = x.v[span.lead], rows.decay.value_gate
    product = dvalues.view(raw.shape)
    by_factor = _over_values(x, torch.mul(product, raw, out=product).view(dvalues.shape))
    dscale = by_factor if gate is None else by_factor * gate.write
    if dpairs.values is not None:
        dscale = dscale + _over_values(x, dpairs.values * load(raw, x.dtype).flatten(2))
    if not _scalar(x):
        dscale = dscale.unflatten(-1, x.v.shape[4:]).sum(-1)
    store(chunks, dscale)
    if gate is None:
        return by_factor
    assert rows.write_factor is not None
    return by_factor.mul_(rows.write_factor.flatten(0, 2).flatten(2))


def _value_reads(
    x: InputChunks,
    rows: AdditiveRows,
    states: SpanStates,
    pairs: Tensor | None,
    do: Tensor,
    terms: DecayTerms,
    work: Scratch,
) -> Tensor:
    """Return the values' read factor times its gradient, (b, C, r V), or r for a scalar."""
    if terms.output is not None:
        return terms.output
    if _scalar(x) and x.v.shape[4] == 1 and pairs is not None:
        # Summed over values, o do is q dq, which is at hand.
        assert terms.reads is not None
        return terms.reads.sum(-1, keepdim=True)
    reads = torch.bmm(rows.read, states.starts, out=work.take("o_do", *do.shape))
    if pairs is not None:
        reads.baddbmm_(pairs, rows.values)
    return _over_values(x, reads.mul_(do))


def _store_value_decay(
    x: InputChunks,
    rows: AdditiveRows,
    read: Tensor,
    written: Tensor,
    dpairs: PairGradients,
    terms: DecayTerms,
    chunks: Tensor,
) -> None:
    assert rows.decay.value_gate is not None
    assert terms.value_total is not None
    dg = rows.decay.value_gate.backward(read, written, _over_values(x, terms.value_total))
    store(chunks, dg if dpairs.value_decay is None else dg.add_(dpairs.value_decay))


def _scalar(x: InputChunks) -> bool:
    """Whether the decay over values is one number per value head."""
    return x.value_decay is not None and x.value_decay.shape[5] == 1


def _over_values(x: InputChunks, rows: Tensor) -> Tensor:
    """Sum (..., r V) over values where their decay is a scalar."""
    return rows.unflatten(-1, x.v.shape[4:]).sum(-1) if _scalar(x) else rows
