"""Backward pass of chunked linear attention; the formulas are those of ``segment.py`` transposed.

Legend: as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_kernels.chunked.layout import load, store, walk_back
from hybrid_kernels.chunked.memory import Scratch
from hybrid_kernels.chunked.pairs import apply_pairs_backward, key_pairs_backward
from hybrid_kernels.chunked.segment import Problem, Run


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


def backward(p: Problem, saved: Tensor, do: Tensor, dstate: Tensor, grads: Gradients) -> None:
    """Fill the gradients of all inputs.

    Args:
        p: the inputs.
        saved: what ``forward`` returned.
        do: chunks of the output's gradient, (leading, sequences, C, G, r, V).
        dstate: gradient of the final states; becomes that of the initial ones.
        grads: chunks to fill.
    """
    end = saved.shape[0]
    wanted = grads.key_decay is not None or grads.value_decay is not None
    scratch = Scratch(p.dtype, saved.device)
    for segment in reversed(p.layout.segments()):
        rows = segment.width * p.heads
        run = Run(p, segment, scratch)
        run.pass_states(saved[end - rows : end].clone())
        step = _Pass(run, do[segment.lead], wanted)
        step.pass_states(dstate)
        step.pass_pairs()
        step.store_rows(grads)
        step.store_decays(grads)
        end -= rows


class _Pass:
    """The backward pass of one segment.

    Attributes (b leading):
        do: (C, r V) the output's gradient times scale and the values' read factor.
        dreads: (X, r V) gradient of what rows read from the states: ``do``, and for the delta rule
            below it that of the values, ``dvalues``.
        dends: (K, r V) gradient of the states after each chunk; then, of what rows write there.
        dwritten: (C, r V) gradient of what the delta rule writes.
    """

    def __init__(self, run: Run, do: Tensor, decays_wanted: bool):
        p = run.p
        self.run, self.p, self.chunk, self.lead = run, p, p.layout.chunk, run.segment.lead
        self.decays_wanted = decays_wanted
        self.queries, self.take = run.read[:, : self.chunk], run.scratch.take
        rows, size = run.read.shape[:2]
        self.dreads = self.take("dreads", rows, size, run.values.shape[2])
        self.do = self.dreads[:, : self.chunk]
        factor = run.value_factor("output")
        load(do, p.dtype, factor, self.do.unflatten(2, p.v.shape[4:]))
        if run.exact_values:
            self.raw_do = load(do, p.dtype).flatten(2) * p.scale

    def pass_states(self, dstate: Tensor) -> None:
        """Walk the states' gradient backwards; ``dstate`` becomes that before the segment."""
        run, segment = self.run, self.run.segment
        # What each chunk's reads add lies where the gradient before it will.
        befores, self.dends = segment.states(
            run.scratch, "dstates", self.p.heads, run.starts.shape[1:]
        )
        torch.bmm(self.queries.mT, self.do, out=befores)
        dreads = run.split(befores)
        totals = None if run.total is None else run.total.split(run.sizes)
        if run.delta:
            self.dwritten = self.take("dwritten", *run.written.shape)
            torch.bmm(run.pairs[:, : self.chunk].mT, self.do, out=self.dwritten)
            dwritten, carry = run.split(self.dwritten), run.split(run.carry)
            erase = run.split(run.erase.mT)
        for i, after, before in walk_back(dreads, run.split(self.dends), dstate):
            if totals is None:
                torch.add(dreads[i], after, out=before)
            else:
                torch.addcmul(dreads[i], after, totals[i], out=before)
            if run.delta:
                du = dwritten[i].baddbmm_(carry[i], after)
                before.baddbmm_(erase[i], du)
        if self.decays_wanted and run.total is not None:
            self.dtotal = self._total_gradient(run.total)
        if run.total is not None and not self.p.exact:
            # What rescaled rows write decays to the chunk's end.
            torch.mul(self.dends, run.total, out=self.dends)

    def _total_gradient(self, total: Tensor) -> Tensor:
        """Return the decay over the chunk times its gradient, (K, r V).

        Rescaled, it is what the whole state after the chunk goes through; exact, only the state
        before it does.
        """
        if self.p.exact:
            return (self.run.starts * self.dends).mul_(total)
        return self._product("dtotal", self.run.ends, self.dends)

    def pass_pairs(self) -> None:
        """Find the gradients of pairs, reading rows, writing rows and values."""
        run, do = self.run, self.do
        self.dvalues = self.take("dvalues", *run.values.shape)
        if run.delta:
            torch.bmm(run.inverse.mT, self.dwritten, out=self.dvalues)
            self.dreads[:, self.chunk :] = self.dvalues
        else:
            torch.bmm(run.write, self.dends, out=self.dvalues)
        if run.exact_values:
            dpairs = self._exact_value_pairs()
        else:
            dpairs = self.take("dpairs", *run.pairs.shape)
            torch.bmm(self.dreads, run.written.mT, out=dpairs)
            if not run.delta:
                self.dvalues.baddbmm_(run.pairs.mT, do)
        self.ddiagonal = None
        if run.own_diagonal():
            self.ddiagonal = dpairs[:, : self.chunk].diagonal(dim1=1, dim2=2)[..., None].clone()
        self.dread, self.dwrite = (
            self.take("dread", *run.read.shape),
            self.take("dwrite", *run.write.shape),
        )
        torch.bmm(self.dreads, run.starts.mT, out=self.dread)
        torch.bmm(run.written, self.dends.mT, out=self.dwrite)
        if run.exact_keys:
            assert run.key_gate is not None
            self.dpair_read, self.dpair_write, self.dpair_decay = key_pairs_backward(
                dpairs.unflatten(1, (-1, self.chunk)),
                run.raw_read,
                run.raw_k,
                run.key_gate.g,
                self.p.bonus is not None,
            )
            return
        torch.mul(dpairs, run.mask(), out=dpairs)
        self.dread.baddbmm_(dpairs, run.write)
        self.dwrite.baddbmm_(dpairs.mT, run.read)

    def _exact_value_pairs(self) -> Tensor:
        run = self.run
        assert run.value_gate is not None
        raw = run.raw_values()
        dpairs, self.dpair_values, self.dpair_value_decay = apply_pairs_backward(
            self.raw_do, run.pairs, raw, run.value_gate.g
        )
        diagonal = run.pairs.diagonal(dim1=1, dim2=2)[..., None]
        self.dpair_values.addcmul_(diagonal, self.raw_do)
        dpairs.diagonal(dim1=1, dim2=2).copy_((self.raw_do * raw).sum(-1))
        return dpairs

    def store_rows(self, grads: Gradients) -> None:
        """Write the gradients of q, k, v, beta and the bonus."""
        run, lead = self.run, self.lead
        read = run.key_gate.read if run.key_gate else None
        write = run.key_gate.write if run.key_gate else None
        dq = self.dread[:, : self.chunk]
        dk = self.dwrite
        apart = run.delta or run.own_diagonal()
        if apart:
            dq = dq if read is None else dq * read
            dk = dk if write is None else dk * write
            read = write = None
            if run.delta:
                self._store_erasing(dk, grads)
            if run.own_diagonal():
                dq, dk = self._add_own(dq, dk, grads)
        store(grads.q[lead], dq, read)
        store(grads.k[lead], dk, write)
        self._store_values(grads)

    def _store_erasing(self, dk: Tensor, grads: Gradients) -> None:
        """Add what the erasing rows beta k say to dk; write the gradient of beta."""
        run, p = self.run, self.p
        assert grads.beta is not None
        read = run.key_gate.read if run.key_gate else None
        derase = self.dread[:, self.chunk :]
        if read is not None:
            derase = derase * read
        if run.exact_keys:
            derase = derase + self.dpair_read[:, 1]
        dk.addcmul_(derase, run.beta, value=-1)
        product = self.take("product", *self.dvalues.shape)
        factor = self.dvalues.unflatten(2, p.v.shape[4:])
        load(p.v[self.lead], p.dtype, factor, product.view(factor.shape))
        self.dstrength = product.sum(-1, keepdim=True)
        if run.value_gate is not None:
            self.dstrength *= run.value_gate.write
        product = load(p.k[self.lead], p.dtype, derase, self.take("product", *derase.shape))
        store(grads.beta[self.lead], self.dstrength - product.sum(-1, keepdim=True))

    def _add_own(self, dq: Tensor, dk: Tensor, grads: Gradients) -> tuple[Tensor, Tensor]:
        """Add what pairs within the chunk say that are not products of scaled rows."""
        run, p = self.run, self.p
        assert self.ddiagonal is not None
        q, k = load(p.q[self.lead], p.dtype), load(p.k[self.lead], p.dtype)
        if run.exact_keys:
            dq, dk = dq + self.dpair_read[:, 0], dk + self.dpair_write
        if p.bonus is not None:
            assert grads.bonus is not None
            dbonus = (self.ddiagonal * q * k).sum(1)
            grads.bonus += dbonus.unflatten(0, (-1, p.heads)).sum(0)
            q, k = q * run.bonus(), k * run.bonus()
        return torch.addcmul(dq, self.ddiagonal, k), torch.addcmul(dk, self.ddiagonal, q)

    def _store_values(self, grads: Gradients) -> None:
        run, shape = self.run, self.p.v.shape[4:]
        dv, factor = self.dvalues, run.value_factor("write")
        if run.delta:
            strength = run.beta[..., None]
            factor = strength if factor is None else strength * factor
        if run.exact_values:
            assert run.value_gate is not None
            dv, factor = torch.addcmul(self.dpair_values, dv, run.value_gate.write), None
        store(grads.v[self.lead], dv.unflatten(2, shape), factor)

    def store_decays(self, grads: Gradients) -> None:
        """Write the gradients of the log decays: every factor times its own gradient, summed."""
        run = self.run
        if grads.key_decay is None and grads.value_decay is None:
            return
        dtotal = self.dtotal
        if grads.key_decay is not None:
            assert run.key_gate is not None
            reads = self._product("reads", run.read, self.dread)
            if run.delta:
                reads = reads[:, : self.chunk].add_(reads[:, self.chunk :])
            writes = self._product("writes", run.write, self.dwrite)
            keys = (reads, writes, dtotal.sum(2))
            if run.key_gate.read.shape[2] == 1:
                keys = tuple(x.sum(-1, keepdim=True) for x in keys)
            dg = run.key_gate.backward(*keys)
            if run.exact_keys:
                dg += self.dpair_decay
            store(grads.key_decay[self.lead], dg)
        if grads.value_decay is not None:
            self._store_value_decay(grads.value_decay[self.lead], dtotal.sum(1))

    def _product(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return torch.mul(x, y, out=self.take(name, *x.shape))

    def _store_value_decay(self, chunks: Tensor, dtotal: Tensor) -> None:
        run, shape = self.run, self.p.v.shape[4:]
        assert run.value_gate is not None
        scalar = chunks.shape[5] == 1
        writes = run.beta * self.dstrength if run.delta else None
        if writes is None:
            writes = self._product("writes", run.values, self.dvalues)
            writes = writes.unflatten(-1, shape).sum(-1) if scalar else writes
        if scalar and shape[0] == 1 and not run.exact_values:
            # Summed over values, o do is q dq, which is at hand.
            reads = self._product("product", self.queries, self.dread[:, : self.chunk])
            reads = reads.sum(-1, keepdim=True)
        else:
            reads = self.take("product", *self.do.shape)
            torch.bmm(self.queries, run.starts, out=reads)
            if not run.exact_values:
                reads.baddbmm_(run.pairs[:, : self.chunk], run.written)
            reads *= self.do
            reads = reads.unflatten(-1, shape).sum(-1) if scalar else reads
        if scalar:
            dtotal = dtotal.unflatten(-1, shape).sum(-1)
        dg = run.value_gate.backward(reads, writes, dtotal)
        if run.exact_values:
            dg += self.dpair_value_decay
        store(chunks, dg.unflatten(2, (shape[0], -1)))
