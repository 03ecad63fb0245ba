"""Chunked linear attention: one segment of chunks at a time, forward and hand-written backward.

Within a chunk, with X the rows that read (queries, and for the delta rule the erasing keys
e = -beta k), w the rows that write, S the state before the chunk and D its decay over the chunk::

    A = lower(q w^T),  L = strictly lower(e w^T)           each pair decayed (gates.py, pairs.py)
    u = v                                                  additive
    u = (I - L)^-1 (beta v + e S)                          delta rule (arXiv 2406.06484, eq. 6-11;
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
from functools import cached_property

import torch
from torch import Tensor

from hybrid_kernels.chunked.gates import Gate, triangle, triangles
from hybrid_kernels.chunked.inverse import unit_lower_inverse
from hybrid_kernels.chunked.layout import Layout, Segment, load, store, walk
from hybrid_kernels.chunked.memory import Scratch
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

    def key_gate(self, lead: slice) -> Gate | None:
        """Return the gate over keys in a segment."""
        return self._gate("key", self.key_decay, lead, self.bonus is not None, 1.0)

    def value_gate(self, lead: slice) -> Gate | None:
        """Return the gate over values in a segment, (b, C, r V or r)."""
        return self._gate("value", self.value_decay, lead, False, self.scale)

    def _gate(
        self, name: str, decay: Tensor | None, lead: slice, exclusive: bool, scale: float
    ) -> Gate | None:
        if decay is None:
            return None
        if decay.shape[-1] > 1:
            return Gate(load(decay[lead], self.dtype).flatten(2), self.exact, exclusive, scale)
        # A number per row is little: found for all chunks at once, and cut.
        if name not in self._scalar_gates:
            g = load(decay, self.dtype).flatten(2)
            self._scalar_gates[name] = Gate(g, self.exact, exclusive, scale)
        rows = decay.shape[1] * decay.shape[3]
        return self._scalar_gates[name].part(slice(lead.start * rows, lead.stop * rows))

    @cached_property
    def _scalar_gates(self) -> dict[str, Gate]:
        return {}


def forward(p: Problem, state: Tensor, o: Tensor) -> Tensor:
    """Fill ``o`` chunk by chunk.

    Args:
        p: the inputs.
        state: (N G, K, r V) initial states in the layout's order; becomes the final ones.
        o: chunks of the output, (leading, sequences, C, G, r, V).

    Returns:
        The states before each segment, one after the other.
    """
    segments, scratch = p.layout.segments(), Scratch(p.dtype, state.device)
    count = sum(segment.width for segment in segments)
    saved, start = state.new_empty(count * p.heads, *state.shape[1:]), 0
    for segment in segments:
        stop = start + segment.width * p.heads
        saved[start:stop] = state[: stop - start]
        run = Run(p, segment, scratch)
        run.pass_states(state)
        run.store_output(o[segment.lead])
        start = stop
    return saved


class Run:
    """One segment: its factors, pairs and states.

    Attributes (b leading everywhere):
        read: (X, K) queries, below them -beta k for the delta rule, times their read factor.
        write: (C, K) keys times their write factor.
        values: (C, r V) what is written but for the delta rule's correction.
        pairs: (X, C) decayed products, masked.
        starts: (K, r V) states before each chunk; ``ends`` those after it.
        total: (K or 1, r V or 1) decay of the state over each chunk, or None.
        written: (C, r V) u.

    And for the delta rule:
        inverse: (C, C) of I - L.
        erase: (C, K) the inverse times -beta k.
        carry: (C, K) writing rows as they reach the end of the chunk.
    """

    def __init__(self, p: Problem, segment: Segment, scratch: Scratch):
        self.p, self.segment, self.scratch = p, segment, scratch
        self.sizes = tuple(width * p.heads for width in segment.widths)
        self.delta = p.beta is not None
        self.exact_keys = p.exact and p.key_decay is not None
        self.exact_values = p.exact and p.value_decay is not None
        self.key_gate = p.key_gate(segment.lead)
        self.value_gate = p.value_gate(segment.lead)
        self._load_rows()
        self._make_pairs()

    def _load_rows(self) -> None:
        p, lead = self.p, self.segment.lead
        read = self.key_gate.read if self.key_gate else None
        write = self.key_gate.write if self.key_gate else None
        self.write = self.gather("write", p.k, write)
        written = self.value_factor("write")
        if not self.delta:
            self.values = self.gather("values", p.v, written).flatten(2)
            self.read = self.gather("read", p.q, read)
            return
        assert p.beta is not None
        self.beta = load(p.beta[lead], p.dtype)
        strength = self.beta[..., None]
        strength = strength if written is None else strength * written
        self.values = self.gather("values", p.v, strength).flatten(2)
        rows, chunk, size = self.write.shape
        self.read = self.scratch.take("read", rows, 2 * chunk, size)
        load(p.q[lead], p.dtype, read, out=self.read[:, :chunk])
        erase = -self.beta if read is None else -self.beta * read
        load(p.k[lead], p.dtype, erase, out=self.read[:, chunk:])

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut (b, ...) scratch memory into the steps."""
        return self.scratch.split(x, self.sizes)

    def gather(self, name: str, chunks: Tensor, factor: Tensor | None = None) -> Tensor:
        """Load this segment's part, times ``factor``, under a name; a view where that is free."""
        x = chunks[self.segment.lead]
        leading, sequences, chunk, heads, *shape = x.shape
        if factor is None and x.dtype == self.p.dtype and x.transpose(2, 3).is_contiguous():
            return load(x, x.dtype)
        out = self.scratch.take(name, leading * sequences * heads, chunk, *shape)
        return load(x, self.p.dtype, factor, out)

    def value_factor(self, which: str) -> Tensor | None:
        """Return a factor of the value gate as (b, C, r, V or 1), "output" with the scale."""
        if self.value_gate is None:
            if which != "output" or self.p.scale == 1.0:
                return None
            # One element with a dimension: a plain number would take a product to bfloat16 first.
            return self.write.new_full((1,), self.p.scale)
        factor: Tensor = getattr(self.value_gate, which)
        return factor.view(*factor.shape[:2], self.p.v.shape[4], -1)

    def _make_pairs(self) -> None:
        p = self.p
        if self.exact_keys:
            assert self.key_gate is not None
            self.raw_q = load(p.q[self.segment.lead], p.dtype)
            self.raw_k = load(p.k[self.segment.lead], p.dtype)
            readers = [self.raw_q, -self.beta * self.raw_k] if self.delta else [self.raw_q]
            self.raw_read = torch.stack(readers, dim=1)
            self.pairs = key_pairs(
                self.raw_read, self.raw_k, self.key_gate.g, p.bonus is not None
            ).flatten(1, 2)
        else:
            rows, chunk, _ = self.write.shape
            self.pairs = self.scratch.take("pairs", rows, self.read.shape[1], chunk)
            torch.bmm(self.read, self.write.mT, out=self.pairs)
            torch.mul(self.pairs, self.mask(), out=self.pairs)
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
        if self.delta:
            return triangles(chunk, dtype, device)
        return triangle(chunk, 0 if self.p.bonus is None else -1, dtype, device)

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
        self.starts, self.ends = self.segment.states(
            self.scratch, "states", self.p.heads, state.shape[1:]
        )
        step = self._delta_step(late) if self.delta else self._additive_step(late)
        starts = self.split(self.starts)
        ends = self.split(self.ends)
        for i, start, end in walk(starts, ends, state):
            step(i, start, end)

    def _additive_step(self, late: Tensor | None) -> Step:
        self.written = self.values
        # What each chunk adds lies where the state after it will.
        torch.bmm(self.write.mT, self.values, out=self.ends)
        if late is not None:
            torch.mul(self.ends, late, out=self.ends)
        sums = self.split(self.ends)
        if self.total is None:
            return lambda i, start, end: torch.add(sums[i], start, out=end)
        totals = self.total.split(self.sizes)
        return lambda i, start, end: torch.addcmul(sums[i], start, totals[i], out=end)

    def _delta_step(self, late: Tensor | None) -> Step:
        chunk, take = self.p.layout.chunk, self.scratch.take
        self.inverse = unit_lower_inverse(self.pairs[:, chunk:])
        erasing, values = self.read[:, chunk:], self.values
        self.erase = torch.bmm(self.inverse, erasing, out=take("erase", *erasing.shape))
        self.written = torch.bmm(self.inverse, values, out=take("written", *values.shape))
        self.carry = self.write
        if late is not None:
            self.carry = torch.mul(self.write, late.mT, out=take("carry", *self.write.shape))
        erase, written = self.split(self.erase), self.split(self.written)
        carry = self.split(self.carry.mT)
        totals = None if self.total is None else self.total.split(self.sizes)

        def step(i: int, start: Tensor, end: Tensor) -> None:
            u = written[i].baddbmm_(erase[i], start)
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
            # The writing rows have served; their memory is warm.
            out = self.scratch.take("write", *self.written.shape)
            return torch.bmm(queries, self.written, out=out)
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
        store(o, out.unflatten(2, shape), self.value_factor("output"))
