"""Chunked linear attention: one segment of chunks at a time, forward and hand-written backward.

Within a chunk, with X the rows that read (queries, and for the delta rule the erasing keys
beta k), w the rows that write, S the state before the chunk and D its decay over the chunk::

    A = lower(q w^T),  L = strictly lower(beta k w^T)      each pair decayed (gates.py, pairs.py)
    u = v                                                  additive
    u = (I + L)^-1 (beta v - beta k S)                     delta rule (arXiv 2406.06484, eq. 6-11;
                                                           with decay arXiv 2412.06464, eq. 9)
    o = A u + q S
    S' = D S + w^T u          with w decayed to the chunk's end

A segment is recomputed in the backward pass from the state before it, the only thing that the
forward pass keeps.

Legend: B batch, T time, C chunk, b chunks x G of one segment, G heads of q and k, r value heads
per G, H = G r heads of the state, K key dim, V value dim, X reading rows (C, or 2 C for the delta
rule), N sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_kernels.chunked.gates import Gate, triangle
from hybrid_kernels.chunked.inverse import unit_lower_inverse
from hybrid_kernels.chunked.layout import Layout, Segment, load, split, store, walk
from hybrid_kernels.chunked.pairs import apply_pairs, key_pairs

# From the index of a step and its states, fill in the states after it.
Step = Callable[[int, Tensor, Tensor], object]


@dataclass(frozen=True)
class Problem:
    """Checked inputs in chunks: views of (leading, sequences, C, G, ...), see ``Layout``.

    Attributes:
        q: (..., G, K).
        k: (..., G, K).
        v: (..., G, r, V).
        key_decay: (..., G, K or 1), or None.
        value_decay: (..., G, r, V or 1), or None.
        beta: (..., G, 1), or None for the additive form; then r is 1.
        bonus: (G, K), or None; then r is 1.
        scale: of the output.
        exact: which way of decaying pairs.
        layout: of the chunks.
        dtype: to compute in.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_decay: Tensor | None
    value_decay: Tensor | None
    beta: Tensor | None
    bonus: Tensor | None
    scale: float
    exact: bool
    layout: Layout
    dtype: torch.dtype

    @property
    def heads(self) -> int:
        """G, the heads of q and k."""
        return self.q.shape[3]


def forward(p: Problem, state: Tensor, o: Tensor) -> Tensor:
    """Fill ``o`` chunk by chunk.

    Args:
        p: the inputs.
        state: (N G, K, r V) initial states in the layout's order; becomes the final ones.
        o: chunks of the output, (leading, sequences, C, G, r, V).

    Returns:
        The states before each segment, one after the other.
    """
    saved = [state[:0]]
    for segment in p.layout.segments():
        saved.append(state[: segment.width * p.heads].clone())
        run = Run(p, segment)
        run.pass_states(state)
        run.store_output(o[segment.lead])
    return torch.cat(saved)


class Run:
    """One segment: its factors, pairs and states.

    Attributes (b leading everywhere):
        read: (X, K) queries, below them beta k for the delta rule, times their read factor.
        write: (C, K) keys times their write factor.
        values: (C, r V) what is written but for the delta rule's correction.
        pairs: (X, C) decayed products, masked.
        starts: (K, r V) states before each chunk; ``ends`` those after it.
        total: (K or 1, r V or 1) decay of the state over each chunk, or None.
        written: (C, r V) u.

    And for the delta rule:
        inverse: (C, C) of I + L.
        erase: (C, K) the inverse times beta k.
        carry: (C, K) writing rows as they reach the end of the chunk.
    """

    def __init__(self, p: Problem, segment: Segment):
        self.p, self.segment = p, segment
        self.delta = p.beta is not None
        self.exact_keys = p.exact and p.key_decay is not None
        self.exact_values = p.exact and p.value_decay is not None
        self._load_gates()
        self._load_rows()
        self._make_pairs()

    def _load_gates(self) -> None:
        p, exclusive = self.p, self.p.bonus is not None
        self.key_gate = self.value_gate = None
        if p.key_decay is not None:
            g = load(p.key_decay[self.segment.lead], p.dtype)
            self.key_gate = Gate(g, p.exact, exclusive)
        if p.value_decay is not None:
            g = load(p.value_decay[self.segment.lead], p.dtype)
            self.value_gate = Gate(g.flatten(2), p.exact, exclusive=False)

    def _load_rows(self) -> None:
        p, lead = self.p, self.segment.lead
        read = self.key_gate.read if self.key_gate else None
        write = self.key_gate.write if self.key_gate else None
        self.write = load(p.k[lead], p.dtype, write)
        written = self.value_factor("write")
        if not self.delta:
            self.values = load(p.v[lead], p.dtype, written).flatten(2)
            self.read = load(p.q[lead], p.dtype, read)
            return
        assert p.beta is not None
        self.beta = load(p.beta[lead], p.dtype)
        strength = self.beta[..., None]
        strength = strength if written is None else strength * written
        self.values = load(p.v[lead], p.dtype, strength).flatten(2)
        rows, chunk, size = self.write.shape
        self.read = self.write.new_empty(rows, 2 * chunk, size)
        load(p.q[lead], p.dtype, read, out=self.read[:, :chunk])
        erase = self.beta if read is None else self.beta * read
        load(p.k[lead], p.dtype, erase, out=self.read[:, chunk:])

    def value_factor(self, which: str, scale: float = 1.0) -> Tensor | None:
        """Return the value gate's factor as (b, C, r, V or 1), times ``scale``."""
        if self.value_gate is None:
            # One element with a dimension: a plain number would take a product to bfloat16 first.
            return None if scale == 1.0 else self.write.new_full((1,), scale)
        factor = getattr(self.value_gate, which).unflatten(2, (*self.p.v.shape[4:5], -1))
        return factor if scale == 1.0 else factor * scale

    def _make_pairs(self) -> None:
        p = self.p
        if self.exact_keys:
            assert self.key_gate is not None
            self.raw_q = load(p.q[self.segment.lead], p.dtype)
            self.raw_k = load(p.k[self.segment.lead], p.dtype)
            readers = [self.raw_q, self.beta * self.raw_k] if self.delta else [self.raw_q]
            self.raw_read = torch.stack(readers, dim=1)
            self.pairs = key_pairs(
                self.raw_read, self.raw_k, self.key_gate.g, p.bonus is not None
            ).flatten(1, 2)
        else:
            self.pairs = torch.bmm(self.read, self.write.mT)
            self.pairs *= self.mask()
        if self.own_diagonal():
            q, k = self._diagonal_rows()
            self.pairs[:, : p.layout.chunk].diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))

    def own_diagonal(self) -> bool:
        """Whether a row's read of its own write is apart from the other pairs."""
        return self.exact_keys or self.p.bonus is not None

    def _diagonal_rows(self) -> tuple[Tensor, Tensor]:
        p, lead = self.p, self.segment.lead
        bonus = None if p.bonus is None else self.bonus()
        return load(p.q[lead], p.dtype, bonus), load(p.k[lead], p.dtype)

    def bonus(self) -> Tensor:
        """Return the bonus as (b, 1, K)."""
        assert self.p.bonus is not None
        chunks = self.write.shape[0] // self.p.heads
        return self.p.bonus.to(self.p.dtype).repeat(chunks, 1)[:, None]

    def mask(self) -> Tensor:
        """Return what pairs are multiplied by: (X, C) ones and zeros."""
        chunk, dtype, device = self.p.layout.chunk, self.p.dtype, self.write.device
        queries = triangle(chunk, 0 if self.p.bonus is None else -1, dtype, device)
        if not self.delta:
            return queries
        return torch.cat([queries, triangle(chunk, -1, dtype, device)])

    def _total(self) -> Tensor | None:
        """Return the decay of the state over each chunk, broadcasting to (b, K, r V)."""
        total = self.key_gate.total[:, :, None] if self.key_gate else None
        if self.value_gate is not None:
            columns = self.value_gate.total[:, None]
            if columns.shape[2] not in (1, self.values.shape[2]):
                columns = columns.repeat_interleave(self.p.v.shape[5], dim=2)
            total = columns if total is None else total * columns
        return total

    def pass_states(self, state: Tensor) -> None:
        """Walk the states through the segment; ``state`` becomes that after it, in place."""
        self.total = self._total()
        # Rescaled rows are relative to the chunk's start; what they write decays to its end.
        late = None if self.p.exact else self.total
        rows, first, last = self.write.shape[0], self.segment.widths[0], self.segment.widths[-1]
        states = state.new_empty(rows + last * self.p.heads, *state.shape[1:])
        self.starts = states[:rows]
        pieces = split(self.starts, self.segment, self.p.heads)
        pieces[0].copy_(state[: pieces[0].shape[0]])
        if self.delta:
            step = self._delta_step(late)
        else:
            step = self._additive_step(late)
        ends = []
        for i, start, end in walk(pieces, state):
            step(i, start, end)
            ends.append(end)
        # While no sequence ends, the states after each step are those before the next.
        states[rows:] = ends[-1]
        self.ends = states[first * self.p.heads :] if first == last else torch.cat(ends)

    def _additive_step(self, late: Tensor | None) -> Step:
        self.written = self.values
        sums = torch.bmm(self.write.mT, self.values)
        if late is not None:
            sums *= late
        sums = split(sums, self.segment, self.p.heads)
        if self.total is None:
            return lambda i, start, end: torch.add(sums[i], start, out=end)
        totals = split(self.total, self.segment, self.p.heads)
        return lambda i, start, end: torch.addcmul(sums[i], start, totals[i], out=end)

    def _delta_step(self, late: Tensor | None) -> Step:
        chunk, segment, heads = self.p.layout.chunk, self.segment, self.p.heads
        self.inverse = unit_lower_inverse(self.pairs[:, chunk:])
        self.erase = torch.bmm(self.inverse, self.read[:, chunk:])
        self.written = torch.bmm(self.inverse, self.values)
        self.carry = self.write if late is None else self.write * late.mT
        erase, written = split(self.erase, segment, heads), split(self.written, segment, heads)
        carry = split(self.carry.mT, segment, heads)
        totals = None if self.total is None else split(self.total, segment, heads)

        def step(i: int, start: Tensor, end: Tensor) -> None:
            u = written[i].baddbmm_(erase[i], start, alpha=-1)
            if totals is None:
                torch.baddbmm(start, carry[i], u, out=end)
            else:
                torch.mul(start, totals[i], out=end)
                end.baddbmm_(carry[i], u)

        return step

    def _pair_output(self) -> Tensor:
        """Return what the chunk's own writes give, for exact value decays before scaling."""
        queries = self.pairs[:, : self.p.layout.chunk]
        if not self.exact_values:
            return torch.bmm(queries, self.written)
        assert self.value_gate is not None
        raw = self.raw_values()
        o = apply_pairs(queries, raw, self.value_gate.g)
        return o.addcmul_(queries.diagonal(dim1=1, dim2=2)[..., None], raw)

    def raw_values(self) -> Tensor:
        """Return the values without any factor, (b, C, V)."""
        return load(self.p.v[self.segment.lead], self.p.dtype).flatten(2)

    def store_output(self, o: Tensor) -> None:
        """Write the segment's output into its chunks."""
        p, queries = self.p, self.read[:, : self.p.layout.chunk]
        shape = self.p.v.shape[4:]
        if self.exact_values:
            out = torch.bmm(queries, self.starts).mul_(self.value_gate.read)
            out += self._pair_output()
            store(o, out.mul_(p.scale).unflatten(2, shape))
            return
        out = self._pair_output().baddbmm_(queries, self.starts)
        store(o, out.unflatten(2, shape), self.value_factor("read", p.scale))
