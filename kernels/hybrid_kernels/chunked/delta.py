"""The delta rule in chunks, forward and backward, one segment at a time like ``additive.py``.

Within a chunk, with e the keys that erase and w the keys that write (one and the same unless keys
decay), S the state before the chunk, D its decay over the chunk and d the decay of the values::

    P = lower(q w^T),  A = beta strictly lower(e w^T)
    u = (I + A)^-1 beta (v / d - e S)                      arXiv 2406.06484, eq. 6-11;
    o = (P u + q S) d scale                                with decay arXiv 2412.06464, eq. 9
    S' = D S + D w^T u

Beta is put on C x C matrices, which are half as large as rows of keys or values.

All segments but the last are of one shape, for which memory and its views are laid out once.

Legend: as in ``additive.py``; r is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.chunked.additive import InputChunks
from hybrid_kernels.chunked.chunk_plan import (
    ChunkSpan,
    StateCarry,
    accumulate,
    load,
    store,
    walk,
    walk_back,
)
from hybrid_kernels.chunked.gradient import Gradients
from hybrid_kernels.chunked.inverse import unit_lower_inverse
from hybrid_kernels.chunked.memory import Scratch
from hybrid_kernels.chunked.pairs import key_pairs, key_pairs_backward
from hybrid_kernels.chunked.saved import Saved


class DeltaRun:
    """Segments of the delta rule, one after the other, as ``Run`` does them.

    Attributes (b leading everywhere):
        beta: (C, 1).
        read: (2 C, K) ``queries``, below them the ``erasing`` keys e.
        write: (C, K) w.
        values: (C, V) v / d.
        query_pairs: (C, C) P.
        inverse: (C, C) that of I + A.
        weights: (C, C) the inverse times beta; before that, A, read below the diagonal only.
        erase: (C, K) the weights times e.
        carry: (C, K) writing rows as they reach the end of the chunk.
        written: (C, V) u.
        starts: (K, V) states before each chunk; ``ends`` those after it.
        total: (K or 1, 1) decay of the state over each chunk, or None.
    """

    def __init__(self, p: InputChunks, scratch: Scratch, saved: Saved | None):
        assert p.beta is not None
        self.p, self.scratch, self.saved, self.chunk = p, scratch, saved, p.plan.chunk
        self.v = p.v.squeeze(4)
        self.all_beta = load(p.beta, p.dtype)
        # Without d. One element with a dimension: a number would take a product to bfloat16 first.
        self.scale = self.all_beta.new_full((1,), p.scale)
        self.sizes: tuple[int, ...] = ()

    def begin(self, segment: ChunkSpan) -> None:
        """Load a segment's rows."""
        p, lead, heads = self.p, segment.lead, self.p.heads
        self.segment = segment
        sizes = tuple([width * heads for width in segment.widths])
        if sizes != self.sizes:
            self.sizes = sizes
            self._lay_out()
        self.key_gate, self.value_gate = p.key_gate(lead), p.value_gate(lead)
        rows = p.q.shape[1] * heads
        self.beta = self.all_beta[lead.start * rows : lead.stop * rows]
        self._load_rows()

    def _lay_out(self) -> None:
        p, take, segment = self.p, self.scratch.take, self.segment
        rows, chunk, key, value = sum(self.sizes), self.chunk, p.k.shape[4], p.v.shape[5]
        # As the inputs come, (leading, sequences, G, C, ...).
        cut = (rows // (p.q.shape[1] * p.heads), *p.q.shape[1:3])
        self.read = take("read", rows, 2 * chunk, key)
        self.queries, self.erasing = self.read.split(chunk, dim=1)
        self.write = self.erasing if p.key_decay is None else take("write", rows, chunk, key)
        self.values = take("values", rows, chunk, value)
        self.cut_queries, self.cut_erasing, self.cut_write, self.cut_values = (
            x.unflatten(0, cut) for x in (self.queries, self.erasing, self.write, self.values)
        )
        # Forward with those of erasing keys below; in the backward pass alone.
        self.both_pairs = take("pairs", rows, 2 * chunk, chunk)
        self.upper_pairs, self.erasing_pairs = self.both_pairs.split(chunk, dim=1)
        self.single_pairs = take("pairs", rows, chunk, chunk)
        self.weights = take("weights", rows, chunk, chunk)
        self.erase = take("erase", rows, chunk, key)
        if self.saved is None:
            self.written = take("written", rows, chunk, value)
            self.inverse = take("inverse", rows, chunk, chunk)
            self.step_written = self.written.split_with_sizes(self.sizes)
        decays = p.key_decay is not None or p.value_decay is not None
        self.carry = take("carry", rows, chunk, key) if decays and not p.exact else self.write
        self.write_columns = self.write.mT
        states = take("states", segment.states(p.heads), key, value)
        self.starts, self.ends = segment.before_and_after(states, p.heads)
        self.step_starts, self.step_ends, self.step_erase, self.step_carry = (
            x.split_with_sizes(self.sizes)
            for x in (self.starts, self.ends, self.erase, self.carry.mT)
        )

    def _load_rows(self) -> None:
        p, lead, keys = self.p, self.segment.lead, self.p.k[self.segment.lead]
        factor = self.key_gate.read if self.key_gate else None
        load(p.q[lead], p.dtype, factor, self.cut_queries)
        load(keys, p.dtype, factor, self.cut_erasing)
        factor = self.value_gate.write if self.value_gate else None
        load(self.v[lead], p.dtype, factor, self.cut_values)
        self.total = None
        if self.key_gate:
            load(keys, p.dtype, self.key_gate.write, self.cut_write)
            self.total = self.key_gate.total[..., None]
        elif self.value_gate:
            self.total = self.value_gate.total[..., None]
        self.totals = None if self.total is None else self.total.split_with_sizes(self.sizes)
        if self.total is not None and not p.exact:
            # Rescaled rows are relative to the chunk's start; what they write decays to its end.
            torch.mul(self.write, self.total.mT, out=self.carry)

    def pass_states(self, carried: StateCarry) -> None:
        """Walk the states through the segment."""
        if self.saved is not None:
            carried.enter(self.saved.before(self.segment))
            self.written, self.inverse = self.saved.delta(self.segment)
            self.step_written = self.written.split_with_sizes(self.sizes)
        self._make_pairs()
        unit_lower_inverse(self.weights, self.inverse)
        self._weigh()
        torch.bmm(self.weights, self.values, out=self.written)
        written, erase, carry = self.step_written, self.step_erase, self.step_carry
        totals = self.totals
        carried.enter(self.step_starts[0])
        for i, start, end in walk(self.step_starts, self.step_ends, carried):
            u = written[i].baddbmm_(erase[i], start, alpha=-1)
            if totals is None:
                torch.baddbmm(start, carry[i], u, out=end)
            else:
                torch.mul(start, totals[i], out=end)
                end.baddbmm_(carry[i], u)

    def recall(self) -> None:
        """Bring the segment's states back, once all have been passed on."""
        assert self.saved is not None
        self.written, self.inverse = self.saved.delta(self.segment)
        self._make_query_pairs()
        self._weigh()
        carried = StateCarry.again(self.saved.before(self.segment), self.p.plan)
        carried.enter(self.step_starts[0])
        torch.bmm(self.carry.mT, self.written, out=self.ends)
        accumulate(self.step_starts, self.step_ends, carried, self.totals)

    def _make_pairs(self) -> None:
        """Find the pairs of queries, and A where the weights will be."""
        if self.p.exact and self.key_gate:
            self._make_exact_pairs()
            return
        torch.bmm(self.read, self.write_columns, out=self.both_pairs)
        self.query_pairs = self.upper_pairs.tril_()
        torch.mul(self.erasing_pairs, self.beta, out=self.weights)

    def _make_query_pairs(self) -> None:
        if self.p.exact and self.key_gate:
            self._make_exact_pairs()
            return
        torch.bmm(self.queries, self.write_columns, out=self.single_pairs)
        self.query_pairs = self.single_pairs.tril_()

    def _make_exact_pairs(self) -> None:
        assert self.key_gate is not None
        self.raw_q = load(self.p.q[self.segment.lead], self.p.dtype)
        self.raw_k = load(self.p.k[self.segment.lead], self.p.dtype)
        self.raw_read = torch.stack([self.raw_q, self.beta * self.raw_k], dim=1)
        pairs = key_pairs(self.raw_read, self.raw_k, self.key_gate.g, exclusive=False)
        self.query_pairs, erasing = pairs.unbind(1)
        self.query_pairs.diagonal(dim1=1, dim2=2).copy_((self.raw_q * self.raw_k).sum(-1))
        self.weights.copy_(erasing)

    def _weigh(self) -> None:
        torch.mul(self.inverse, self.beta.mT, out=self.weights)
        torch.bmm(self.weights, self.erasing, out=self.erase)

    def store_output(self, o: Tensor) -> None:
        """Write the segment's output into its chunks."""
        # The values have served; their memory is warm.
        torch.bmm(self.query_pairs, self.written, out=self.values)
        self.values.baddbmm_(self.queries, self.starts)
        store(o.squeeze(4), self.cut_values, self.output_factor())

    def output_factor(self) -> Tensor:
        """Return d times scale."""
        return self.value_gate.output if self.value_gate else self.scale


class DeltaPass:
    """The backward pass of the segment that a ``DeltaRun`` is at.

    Attributes (b leading):
        do: (C, V) the output's gradient times scale and d.
        residual: (C, V) gradient of what the inverse is applied to, over beta.
        dreads: (2 C, V) ``do``, and below it ``residual``.
        dread: (2 C, K) gradient of ``read``, over -beta in the lower half; ``dwrite`` (C, K) that
            of ``write``.
        dends: (K, V) gradient of the states after each chunk.
        dwritten: (C, V) gradient of u.
    """

    def __init__(self, run: DeltaRun, grads: Gradients):
        self.run, self.p, self.chunk, self.grads = run, run.p, run.chunk, grads
        self.decays_wanted = grads.of_decays
        self.sizes: tuple[int, ...] = ()

    def begin(self, o: Tensor | None, do: Tensor) -> None:
        """Load the output's gradient."""
        run = self.run
        self.lead = run.segment.lead
        if run.sizes != self.sizes:
            self.sizes = run.sizes
            self._lay_out()
        load(do.squeeze(4), self.p.dtype, run.output_factor(), self.cut_do)

    def _lay_out(self) -> None:
        run, chunk, take = self.run, self.chunk, self.run.scratch.take
        rows, _, value = run.written.shape
        self.dreads = take("dreads", rows, 2 * chunk, value)
        self.do, self.dreads_below = self.dreads.split(chunk, dim=1)
        self.cut_do = self.do.view(run.cut_values.shape)
        # Not at once below ``do``: a batched product into memory with gaps is many single ones.
        self.residual = take("erase", rows, chunk, value)
        self.dwritten = take("dwritten", rows, chunk, value)
        self.dpairs = take("pairs", rows, 2 * chunk, chunk)
        self.dpairs_below = self.dpairs[:, chunk:]
        self.dread, self.dwrite = take("dread", *run.read.shape), take("dwritten", *run.write.shape)
        self.dqueries, self.derasing = self.dread.split(chunk, dim=1)
        self.reads = take("dreads", *run.read.shape)
        self.query_reads, self.erasing_reads = self.reads.split(chunk, dim=1)
        heads = self.p.heads
        states = take("dstates", run.segment.states(heads), *run.starts.shape[1:])
        self.befores, self.dends = run.segment.before_and_after(states, heads)
        (
            self.step_befores,
            self.step_afters,
            self.step_dwritten,
            self.step_carry,
            self.step_erase,
        ) = (
            x.split_with_sizes(run.sizes)
            for x in (self.befores, self.dends, self.dwritten, run.carry, run.erase.mT)
        )

    def pass_states(self, carried: StateCarry) -> None:
        """Walk the states' gradient backwards."""
        run, dwritten = self.run, self.step_dwritten
        carried.enter(self.step_afters[-1])
        # What each chunk's reads add lies where the gradient before it will.
        torch.bmm(run.queries.mT, self.do, out=self.befores)
        torch.bmm(run.query_pairs.mT, self.do, out=self.dwritten)
        for i, after, before in walk_back(self.step_befores, self.step_afters, carried):
            du = dwritten[i].baddbmm_(self.step_carry[i], after)
            if run.totals is None:
                before.add_(after)
            else:
                before.addcmul_(after, run.totals[i])
            before.baddbmm_(self.step_erase[i], du, alpha=-1)
        if self.decays_wanted and run.total is not None:
            self._find_total_gradient()

    def _find_total_gradient(self) -> None:
        """Find the decay over the chunk times its gradient, (K) or (1).

        Rescaled, it is what the whole state after the chunk goes through; exact, only the state
        before it does.
        """
        run = self.run
        states = run.starts if self.p.exact else run.ends
        product = torch.mul(states, self.dends, out=self._like("dread", self.dends))
        self.dtotal = product.sum(2) if run.key_gate else product.sum((1, 2))[:, None]
        if self.p.exact:
            self.dtotal *= run.total.squeeze(2)

    def _like(self, name: str, x: Tensor) -> Tensor:
        return self.run.scratch.take(name, *x.shape)

    def pass_pairs(self) -> None:
        """Find the gradients of pairs, reading rows and writing rows."""
        run = self.run
        torch.bmm(run.inverse.mT, self.dwritten, out=self.residual)
        self.dreads_below.copy_(self.residual)
        torch.bmm(self.dreads, run.written.mT, out=self.dpairs)
        torch.bmm(self.dreads, run.starts.mT, out=self.dread)
        torch.bmm(run.written, self.dends.mT, out=self.dwrite)
        if run.total is not None and not self.p.exact:
            # What rescaled rows write decays to the chunk's end.
            self.dwrite.mul_(run.total.mT)
        if self.p.exact and run.key_gate:
            self._pass_exact_pairs()
            return
        self.dpairs.unflatten(1, (2, -1)).tril_()
        self.dpairs_below.diagonal(dim1=1, dim2=2).zero_()
        self.dread.baddbmm_(self.dpairs, run.write)
        self.dpairs_below.mul_(-run.beta)
        self.dwrite.baddbmm_(self.dpairs.mT, run.read)

    def _pass_exact_pairs(self) -> None:
        run = self.run
        assert run.key_gate is not None
        self.ddiagonal = self.dpairs.diagonal(dim1=1, dim2=2)[..., None].clone()
        self.dpairs_below.neg_()
        self.dpair_read, self.dpair_write, self.dpair_decay = key_pairs_backward(
            self.dpairs.unflatten(1, (2, -1)), run.raw_read, run.raw_k, run.key_gate.g, False
        )

    def store_rows(self) -> None:
        """Write the gradients of q, k, v and beta."""
        run, gate, lead, grads = self.run, self.run.key_gate, self.lead, self.grads
        # For beta and for the decays: rows times their gradients.
        torch.mul(run.read, self.dread, out=self.reads)
        if gate and self.decays_wanted:
            self.writes = torch.mul(run.write, self.dwrite, out=self._like("writes", run.write))
        self._store_values()
        dk = self.dwrite
        if gate is None:
            store(grads.q[lead], self.dqueries)
            store(grads.k[lead], dk.addcmul_(self.derasing, run.beta, value=-1))
        elif not self.p.exact:
            store(grads.q[lead], self.dqueries, gate.read)
            self.derasing.mul_(run.beta)
            dk.mul_(gate.write).addcmul_(self.derasing, gate.read, value=-1)
            store(grads.k[lead], dk)
        else:
            dq = torch.addcmul(self.dpair_read[:, 0], self.dqueries, gate.read)
            derase = torch.addcmul(self.dpair_read[:, 1], self.derasing, gate.read, value=-1)
            dk = torch.addcmul(self.dpair_write, dk, gate.write).addcmul_(derase, run.beta)
            store(grads.q[lead], dq.addcmul_(self.ddiagonal, run.raw_k))
            store(grads.k[lead], dk.addcmul_(self.ddiagonal, run.raw_q))

    def _store_values(self) -> None:
        """Write the gradients of v, and of beta: both what it gives by v and takes by e."""
        run, grads = self.run, self.grads
        assert grads.beta is not None
        product = torch.mul(run.values, self.residual, out=run.values)
        self.given, strength = product.sum(-1, keepdim=True), run.beta
        if run.value_gate:
            strength = strength * run.value_gate.write
            # For the decay as well as for beta.
            self.read_sums, taken = self.reads.sum(-1, keepdim=True).split(self.chunk, dim=1)
        else:
            taken = self.erasing_reads.sum(-1, keepdim=True)
        if self.p.exact and run.key_gate:
            taken -= (run.raw_k * self.dpair_read[:, 1]).sum(-1, keepdim=True)
        store(grads.beta[self.lead], self.given - taken)
        store(grads.v[self.lead].squeeze(4), self.residual, strength)

    def store_decays(self) -> None:
        """Write the gradient of the log decay: every factor times its own gradient, summed."""
        run, grads = self.run, self.grads
        if grads.value_decay is not None:
            assert run.value_gate is not None
            given = self.given.mul_(run.beta)
            dg = run.value_gate.backward(self.read_sums, given, self.dtotal)
            store(grads.value_decay[self.lead], dg)
        if grads.key_decay is not None:
            assert run.key_gate is not None
            reads = self.query_reads.addcmul_(self.erasing_reads, run.beta, value=-1)
            keys = (reads, self.writes, self.dtotal)
            if run.key_gate.read.shape[2] == 1:
                keys = tuple(x.sum(-1, keepdim=True) for x in keys)
            dg = run.key_gate.backward(*keys)
            if self.p.exact:
                dg += self.dpair_decay
            store(grads.key_decay[self.lead], dg)
