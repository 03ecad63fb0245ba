"""Chunked linear attention: one segment of chunks, forward; here the additive form.

Within a chunk, with w the rows that write, S the state before the chunk and D its decay over the
chunk::

    A = lower(q w^T)          each pair decayed (gates.py, pairs.py)
    o = A v + q S
    S' = D S + w^T v          with w decayed to the chunk's end

Legend: B batch, T time, C chunk, b chunks x G of one segment, G heads of q and k, r value heads
per G, H = G r heads of the state, K key dim, V value dim, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hybrid_kernels.chunked.chunk_plan import (
    ChunkPlan,
    ChunkSpan,
    StateCarry,
    accumulate,
    load,
    store,
)
from hybrid_kernels.chunked.gates import Gate
from hybrid_kernels.chunked.memory import Scratch
from hybrid_kernels.chunked.pairs import apply_pairs, key_pairs
from hybrid_kernels.chunked.saved import Saved


@dataclass(frozen=True)
class InputChunks:
    """Checked inputs in chunks: views of (leading, sequences, G, C, ...), see ``ChunkPlan``.

    Attributes:
        q: (..., K).
        k: (..., K).
        v: (..., r, V).
        key_decay: (..., K or 1), or None.
        value_decay: (..., r, V or 1), or None.
        beta: (..., 1), or None for the additive form; then r is 1.
        bonus: (G, K), or None; then r is 1.
        write_scale: (..., r, 1), or None; a factor on values.
        scale: of the output.
        exact: which way of decaying pairs.
        plan: of the chunks.
        dtype: to compute in.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_decay: Tensor | None
    value_decay: Tensor | None
    beta: Tensor | None
    bonus: Tensor | None
    write_scale: Tensor | None
    scale: float
    exact: bool
    plan: ChunkPlan
    dtype: torch.dtype

    @property
    def heads(self) -> int:
        """G, the heads of q and k."""
        return self.q.shape[2]

    @property
    def state_shape(self) -> tuple[int, int]:
        """(K, r V)."""
        return self.k.shape[4], self.v.shape[4] * self.v.shape[5]

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
        # Where the decay is fixed per head (and expanded), one segment's is like the other's.
        fixed = decay.stride(0) == 0
        key = (name, lead.stop - lead.start if fixed else lead.start)
        if key not in self._scalar_gates:
            # A number per row is little: found for all chunks at once, and cut.
            part = decay[lead] if fixed else decay
            gate = Gate(load(part, self.dtype).flatten(2), self.exact, exclusive, scale)
            if fixed:
                self._scalar_gates[key] = gate
            else:
                self._cut(name, gate)
        return self._scalar_gates[key]

    def _cut(self, name: str, gate: Gate) -> None:
        leads = [segment.lead for segment in self.plan.segments]
        rows = gate.g.shape[0] // leads[-1].stop
        parts = gate.split([rows * (lead.stop - lead.start) for lead in leads])
        for lead, part in zip(leads, parts, strict=True):
            self._scalar_gates[name, lead.start] = part

    @cached_property
    def _scalar_gates(self) -> dict[tuple[str, int], Gate]:
        return {}


class Run:
    """Segments of the additive form, one after the other.

    Each is begun (``begin``); then its states are passed on and its output stored, or, for the
    backward pass, its states are recalled.

    Attributes (b leading everywhere):
        key_gate, value_gate: decays, or None.
        write_factor, output_factor: what values and output are multiplied by in ``load`` and
            ``store``, the scales included, or None.
        write_scale: that of the segment's rows, or None.
        read: (C, K) queries times their read factor.
        write: (C, K) keys times their write factor.
        values: (C, r V) times their write factor.
        pairs: (C, C) decayed products, masked; ``make_pairs`` finds them when they are needed.
        diagonal: the first one of ``pairs`` that is not zero.
        starts: (K, r V) states before each chunk; ``ends`` those after it.
        total: (K or 1, r V or 1) decay of the state over each chunk, or None; ``totals`` by step.
    """

    def __init__(self, p: InputChunks, scratch: Scratch, saved: Saved | None):
        self.p, self.scratch, self.saved = p, scratch, saved
        self.exact_keys = p.exact and p.key_decay is not None
        self.exact_values = p.exact and p.value_decay is not None
        self.diagonal = 0 if p.bonus is None else -1
        self.sizes: tuple[int, ...] = ()
        self.gates: tuple[Gate | None, Gate | None] | None = None

    def begin(self, segment: ChunkSpan) -> None:
        """Load a segment's rows."""
        p = self.p
        self.segment = segment
        heads = p.heads
        sizes = tuple([width * heads for width in segment.widths])
        if sizes != self.sizes:
            self.sizes, self.gates = sizes, None
            self._lay_out()
        gates = (p.key_gate(segment.lead), p.value_gate(segment.lead))
        if gates != self.gates or p.write_scale is not None:
            self.gates = gates
            self._take_factors()
        self.read = self._gather("read", p.q, self.key_gate.read if self.key_gate else None)
        self.write = self._gather("write", p.k, self.key_gate.write if self.key_gate else None)
        self.values = self._gather("values", p.v, self.write_factor)
        if self.exact_keys:
            self.raw_q = load(p.q[segment.lead], p.dtype)
            self.raw_k = load(p.k[segment.lead], p.dtype)

    def _lay_out(self) -> None:
        """Lay out memory and its views, once for all segments but the last."""
        p, take, rows, chunk = self.p, self.scratch.take, sum(self.sizes), self.p.plan.chunk
        # By name, the rows of a segment as products take them, and as they are cut.
        self.places: dict[str, tuple[Tensor, Tensor]] = {}
        self.pairs = take("pairs", rows, chunk, chunk)
        if self.saved is None or not self.saved.every_chunk:
            states = take("states", self.segment.states(p.heads), *p.state_shape)
            self.starts, self.ends = self.segment.before_and_after(states, p.heads)
            self.step_starts = self.starts.split_with_sizes(self.sizes)
            self.step_ends = self.ends.split_with_sizes(self.sizes)

    def _take_saved(self, saved: Saved) -> None:
        """Take the memory of the states from what is saved, where that is those of every chunk."""
        states, steps = saved.states(self.segment)
        self.starts, self.ends = self.segment.before_and_after(states, self.p.heads)
        self.step_starts, self.step_ends = steps[:-1], steps[1:]

    def _gather(self, name: str, chunks: Tensor, factor: Tensor | None) -> Tensor:
        """Load this segment's part, times ``factor``, under a name; a view where that is free.

        The result is (b, C, K or r V).
        """
        x = chunks[self.segment.lead]
        if factor is None and x.dtype == self.p.dtype and x.is_contiguous():
            return x.flatten(0, 2).flatten(2)
        place = self.places.get(name)
        if place is None:
            shape = (x.shape[:3].numel(), x.shape[3], x.shape[4:].numel())
            rows = self.scratch.take(name, *shape)
            place = self.places[name] = (rows, rows.view(x.shape))
        load(x, self.p.dtype, factor, place[1])
        return place[0]

    def _take_factors(self) -> None:
        """Find what values, output and states are multiplied by."""
        assert self.gates is not None
        p = self.p
        self.key_gate, self.value_gate = self.gates
        self.write_factor = self.output_factor = None
        if self.value_gate is not None:
            shape = (-1, *p.v.shape[1:5], self.value_gate.g.shape[2] // p.v.shape[4])
            self.write_factor = self.value_gate.write.view(shape)
            self.output_factor = self.value_gate.output.view(shape)
        elif p.scale != 1.0:
            # One element with a dimension: a plain number would take a product to bfloat16 first.
            self.output_factor = self.p.q.new_full((1,), p.scale, dtype=p.dtype)
        self.write_scale = None
        if p.write_scale is not None:
            self.write_scale = scale = p.write_scale[self.segment.lead].to(p.dtype)
            gate = self.write_factor
            self.write_factor = scale if gate is None else gate * scale
        self.total = self._total()
        self.totals = None if self.total is None else self.total.split_with_sizes(self.sizes)

    def make_pairs(self) -> None:
        """Fill ``pairs``; as late as possible, since the rows are taken from the cache by then."""
        p = self.p
        if self.exact_keys:
            assert self.key_gate is not None
            self.pairs = key_pairs(
                self.raw_q[:, None], self.raw_k, self.key_gate.g, p.bonus is not None
            ).flatten(1, 2)
        else:
            torch.bmm(self.read, self.write.mT, out=self.pairs)
            # Not as a product with zeros, which would keep NaN and inf of later keys.
            self.pairs.tril_(self.diagonal)
        if self.own_diagonal():
            q, k = self._diagonal_rows()
            self.pairs.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))

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

    def _total(self) -> Tensor | None:
        """Return the decay of the state over each chunk, broadcasting to (b, K, r V)."""
        total = self.key_gate.total[:, :, None] if self.key_gate else None
        if self.value_gate is not None:
            columns, (shared, size) = self.value_gate.total[:, None], self.p.v.shape[4:]
            if columns.shape[2] not in (1, shared * size):
                columns = columns[..., None].expand(-1, -1, -1, size).flatten(2)
            total = columns if total is None else total * columns
        return total

    def pass_states(self, carried: StateCarry) -> None:
        """Walk the states through the segment."""
        if self.saved is not None:
            if self.saved.every_chunk:
                self._take_saved(self.saved)
            else:
                carried.enter(self.saved.before(self.segment))
        self._walk(carried)

    def recall(self) -> None:
        """Bring the segment's states back, once all have been passed on."""
        assert self.saved is not None
        if self.saved.every_chunk:
            self._take_saved(self.saved)
        else:
            self._walk(StateCarry.again(self.saved.before(self.segment), self.p.plan))

    def _walk(self, carried: StateCarry) -> None:
        carried.enter(self.step_starts[0])
        # What each chunk adds lies where the state after it will.
        torch.bmm(self.write.mT, self.values, out=self.ends)
        if self.total is not None and not self.p.exact:
            # Rescaled rows are relative to the chunk's start; what they write decays to its end.
            self.ends.mul_(self.total)
        accumulate(self.step_starts, self.step_ends, carried, self.totals)

    def _pair_output(self) -> Tensor:
        """Return what the chunk's own writes give, for exact value decays before scaling."""
        if not self.exact_values:
            # The writing rows have served; their memory is warm.
            out = self.scratch.take("write", *self.values.shape)
            return torch.bmm(self.pairs, self.values, out=out)
        assert self.value_gate is not None
        raw = self.raw_values()
        o = apply_pairs(self.pairs, raw, self.value_gate.g)
        return o.addcmul_(self.pairs.diagonal(dim1=1, dim2=2)[..., None], raw)

    def raw_values(self) -> Tensor:
        """Return the values without decay, (b, C, V)."""
        return load(self.p.v[self.segment.lead], self.p.dtype, self.write_scale).flatten(2)

    def store_output(self, o: Tensor) -> None:
        """Write the segment's output into its chunks."""
        self.make_pairs()
        if self.exact_values:
            out = torch.bmm(self.read, self.starts).mul_(self.value_gate.read)
            out += self._pair_output()
            store(o, out.mul_(self.p.scale))
            return
        out = self._pair_output().baddbmm_(self.read, self.starts)
        store(o, out, self.output_factor)
