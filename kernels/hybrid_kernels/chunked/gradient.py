"""Backward pass of chunked linear attention; the formulas are those of ``additive.py`` transposed.

Legend: as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_kernels.chunked.additive import Run
from hybrid_kernels.chunked.chunk_plan import StateCarry, load, store, walk_back
from hybrid_kernels.chunked.pairs import apply_pairs_backward, key_pairs_backward


@dataclass
class Gradients:
    """Memory for the gradients, in the same chunks as the inputs; None where none is wanted."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_decay: Tensor | None
    value_decay: Tensor | None
    beta: Tensor | None
    bonus: Tensor | None
    write_scale: Tensor | None = None

    @property
    def of_decays(self) -> bool:
        """Whether the decays' gradients are wanted."""
        return self.key_decay is not None or self.value_decay is not None


class Pass:
    """The backward pass of the segment that a ``Run`` is at.

    Attributes (b leading):
        do: (C, r V) the output's gradient times scale and the values' read factor.
        dends: (K, r V) gradient of the states after each chunk; then, of what rows write there.
        dpairs: (C, C) gradient of the pairs.
    """

    def __init__(self, run: Run, grads: Gradients):
        self.run, self.p, self.take, self.grads = run, run.p, run.scratch.take, grads
        self.decays_wanted = grads.of_decays
        self.scalar = run.p.value_decay is not None and run.p.value_decay.shape[5] == 1
        self.sizes: tuple[int, ...] = ()

    def begin(self, o: Tensor | None, do: Tensor) -> None:
        """Load the output's gradient."""
        run, p = self.run, self.p
        self.lead = run.segment.lead
        if run.sizes != self.sizes:
            self.sizes = run.sizes
            self._lay_out()
        load(do, p.dtype, run.output_factor, self.do)
        self.output_reads = None
        if o is not None and run.value_gate and not p.exact:
            product = self.take("dtotal" if self.scalar else "reads", *self.do.shape)
            torch.mul(o, do, out=product.view(o.shape))
            self.output_reads = self._over_values(product)
        if run.exact_values:
            self.raw_do = load(do, p.dtype).flatten(2) * p.scale

    def _lay_out(self) -> None:
        run = self.run
        self.do = self.take("do", *run.values.shape)
        # Pairs are made once this has served.
        self.dpairs = self.take("pairs", *run.pairs.shape)
        heads = self.p.heads
        states = self.take("dstates", run.segment.states(heads), *self.p.state_shape)
        self.befores, self.dends = run.segment.before_and_after(states, heads)
        self.step_befores = self.befores.split_with_sizes(self.sizes)
        self.step_dends = self.dends.split_with_sizes(self.sizes)

    def pass_states(self, carried: StateCarry) -> None:
        """Walk the states' gradient backwards."""
        run, totals = self.run, self.run.totals
        carried.enter(self.step_dends[-1])
        # What each chunk's reads add lies where the gradient before it will.
        torch.bmm(run.read.mT, self.do, out=self.befores)
        for i, after, before in walk_back(self.step_befores, self.step_dends, carried):
            if totals is None:
                before.add_(after)
            else:
                before.addcmul_(after, totals[i])
        if run.total is None:
            return
        if self.decays_wanted:
            dtotal = self._total_gradient(run.total)
            self.dkey_total = dtotal.sum(2) if run.key_gate else None
            self.dvalue_total = dtotal.sum(1) if run.value_gate else None
        if not self.p.exact:
            # What rescaled rows write decays to the chunk's end.
            self.dends.mul_(run.total)

    def _total_gradient(self, total: Tensor) -> Tensor:
        """Return the decay over the chunk times its gradient, (K, r V).

        Rescaled, it is what the whole state after the chunk goes through; exact, only the state
        before it does.
        """
        if self.p.exact:
            return (self.run.starts * self.dends).mul_(total)
        return torch.mul(self.run.ends, self.dends, out=self.take("dtotal", *self.dends.shape))

    def pass_pairs(self) -> None:
        """Find the gradient of pairs, and what exact ones say about rows and decays."""
        run = self.run
        if run.exact_values:
            dpairs = self._exact_value_pairs()
        else:
            dpairs = torch.bmm(self.do, run.values.mT, out=self.dpairs)
        self.ddiagonal = None
        if run.own_diagonal():
            self.ddiagonal = dpairs.diagonal(dim1=1, dim2=2)[..., None].clone()
        if run.exact_keys:
            assert run.key_gate is not None
            self.dpair_read, self.dpair_write, self.dpair_decay = key_pairs_backward(
                dpairs[:, None],
                run.raw_q[:, None],
                run.raw_k,
                run.key_gate.g,
                self.p.bonus is not None,
            )
        else:
            self.dpairs = dpairs.tril_(run.diagonal)

    def _exact_value_pairs(self) -> Tensor:
        run = self.run
        assert run.value_gate is not None
        run.make_pairs()
        raw = run.raw_values()
        dpairs, self.dpair_values, self.dpair_value_decay = apply_pairs_backward(
            self.raw_do, run.pairs, raw, run.value_gate.g
        )
        diagonal = run.pairs.diagonal(dim1=1, dim2=2)[..., None]
        self.dpair_values.addcmul_(diagonal, self.raw_do)
        dpairs.diagonal(dim1=1, dim2=2).copy_((self.raw_do * raw).sum(-1))
        return dpairs

    def store_rows(self) -> None:
        """Write the gradients of q, k, v and the bonus.

        One after the other, since what was just found is still in the cache. What the decays need
        of each, the rows times their gradients, takes its place.
        """
        self._store_queries()
        self._store_keys()
        self._store_values()
        if self.p.bonus is not None:
            self._add_bonus()

    def _store_queries(self) -> None:
        run, gate = self.run, self.run.key_gate
        dread = self.take("dread", *run.read.shape)
        torch.bmm(self.do, run.starts.mT, out=dread)
        if not run.exact_keys:
            dread.baddbmm_(self.dpairs, run.write)
        dq, factor = dread, gate.read if gate else None
        if self.ddiagonal is not None:
            dq, factor = dq if factor is None else dq * factor, None
            if run.exact_keys:
                dq = dq + self.dpair_read[:, 0]
            dq = torch.addcmul(dq, self.ddiagonal, self._through_bonus(self.p.k))
        store(self.grads.q[self.lead], dq, factor)
        if self.decays_wanted and (gate or self.p.v.shape[4] == 1):
            self.reads = dread.mul_(run.read)
            if gate is None:
                self.reads = self.reads.sum(-1, keepdim=True)

    def _store_keys(self) -> None:
        run, gate = self.run, self.run.key_gate
        # Without a gate over keys nothing of the queries' gradient is saved.
        dwrite = self.take("dwrite" if gate else "dread", *run.write.shape)
        torch.bmm(run.values, self.dends.mT, out=dwrite)
        if not run.exact_keys:
            dwrite.baddbmm_(self.dpairs.mT, run.read)
        dk, factor = dwrite, gate.write if gate else None
        if self.ddiagonal is not None:
            dk, factor = dk if factor is None else dk * factor, None
            if run.exact_keys:
                dk = dk + self.dpair_write
            dk = torch.addcmul(dk, self.ddiagonal, self._through_bonus(self.p.q))
        store(self.grads.k[self.lead], dk, factor)
        if gate and self.decays_wanted:
            self.writes = dwrite.mul_(run.write)

    def _through_bonus(self, rows: Tensor) -> Tensor:
        """Return q or k times what a row's read of its own write weighs."""
        bonus = None if self.p.bonus is None else self.run.bonus()
        return load(rows[self.lead], self.p.dtype, bonus)

    def _add_bonus(self) -> None:
        q, k = (load(x[self.lead], self.p.dtype) for x in (self.p.q, self.p.k))
        assert self.grads.bonus is not None
        dbonus = (self.ddiagonal * q * k).sum(1)
        self.grads.bonus += dbonus.unflatten(0, (-1, self.p.heads)).sum(0)

    def _store_values(self) -> None:
        run = self.run
        # The decay's gradient has been summed; its memory is warm.
        self.dvalues = self.take("dtotal", *run.values.shape)
        torch.bmm(run.write, self.dends, out=self.dvalues)
        dv, factor = self.dvalues, run.write_factor
        if run.exact_values:
            assert run.value_gate is not None
            dv = torch.addcmul(self.dpair_values, dv, run.value_gate.write)
            factor = run.write_scale
        else:
            run.make_pairs()
            self.dvalues.baddbmm_(run.pairs.mT, self.do)
        store(self.grads.v[self.lead], dv, factor)

    def store_decays(self) -> None:
        """Write the gradients of the log decays: every factor times its own gradient, summed."""
        run, grads = self.run, self.grads
        if grads.key_decay is not None:
            assert run.key_gate is not None
            assert self.dkey_total is not None
            keys = (self.reads, self.writes, self.dkey_total)
            if run.key_gate.read.shape[2] == 1:
                keys = tuple(x.sum(-1, keepdim=True) for x in keys)
            dg = run.key_gate.backward(*keys)
            if run.exact_keys:
                dg += self.dpair_decay
            store(grads.key_decay[self.lead], dg)
        if grads.value_decay is None and grads.write_scale is None:
            return
        writes = self._over_values(self.dvalues.mul_(run.values))
        if grads.value_decay is not None:
            self._store_value_decay(grads.value_decay[self.lead], writes)
        if grads.write_scale is not None:
            self._store_write_scale(grads.write_scale[self.lead], writes)

    def _store_write_scale(self, chunks: Tensor, writes: Tensor) -> None:
        run = self.run
        assert run.write_scale is not None
        if run.exact_values:
            writes = torch.addcmul(writes, self.dpair_values, run.raw_values())
        if not self.scalar:
            writes = writes.unflatten(-1, self.p.v.shape[4:]).sum(-1)
        # The values had that factor, which is not near 0 (``linear.py``).
        torch.div(writes.view(chunks.shape), run.write_scale, out=chunks)

    def _store_value_decay(self, chunks: Tensor, writes: Tensor) -> None:
        run = self.run
        assert run.value_gate is not None
        assert self.dvalue_total is not None
        total = self._over_values(self.dvalue_total)
        dg = run.value_gate.backward(self._value_reads(), writes, total)
        if run.exact_values:
            dg += self.dpair_value_decay
        store(chunks, dg)

    def _value_reads(self) -> Tensor:
        """Return the values' read factor times its gradient, (b, C, r V), or r for a scalar."""
        run = self.run
        if self.output_reads is not None:
            return self.output_reads
        if self.scalar and self.p.v.shape[4] == 1 and not run.exact_values:
            # Summed over values, o do is q dq, which is at hand.
            return self.reads.sum(-1, keepdim=True)
        reads = torch.bmm(run.read, run.starts, out=self.take("reads", *self.do.shape))
        if not run.exact_values:
            reads.baddbmm_(run.pairs, run.values)
        return self._over_values(reads.mul_(self.do))

    def _over_values(self, x: Tensor) -> Tensor:
        """Sum (..., r V) over values where their decay is a scalar."""
        return x.unflatten(-1, self.p.v.shape[4:]).sum(-1) if self.scalar else x
