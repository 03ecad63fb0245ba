"""Backward pass of chunked linear attention; the formulas are those of ``segment.py`` transposed.

Legend: as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_kernels.chunked.layout import load, split, store, walk_back
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
    for segment in reversed(p.layout.segments()):
        rows = segment.width * p.heads
        run = Run(p, segment)
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
        dends: (K, r V) gradient of the states after each chunk; then, of what rows write there.
        dwritten: (C, r V) gradient of what the delta rule writes.
    """

    def __init__(self, run: Run, do: Tensor, decays_wanted: bool):
        p = run.p
        self.run, self.p, self.chunk, self.lead = run, p, p.layout.chunk, run.segment.lead
        self.decays_wanted = decays_wanted
        self.queries = run.read[:, : self.chunk]
        factor = run.value_factor("read", p.scale)
        self.do = load(do, p.dtype, factor).flatten(2)
        if run.exact_values:
            self.raw_do = load(do, p.dtype).flatten(2) * p.scale

    def pass_states(self, dstate: Tensor) -> None:
        """Walk the states' gradient backwards; ``dstate`` becomes that before the segment."""
        run, segment, heads = self.run, self.run.segment, self.p.heads
        dreads = torch.bmm(self.queries.mT, self.do)
        self.dends = torch.empty_like(dreads)
        dreads = split(dreads, segment, heads)
        totals = None if run.total is None else split(run.total, segment, heads)
        if run.delta:
            self.dwritten = torch.bmm(run.pairs[:, : self.chunk].mT, self.do)
            dwritten, carry = split(self.dwritten, segment, heads), split(run.carry, segment, heads)
            erase = split(run.erase.mT, segment, heads)
        for i, after, before in walk_back(split(self.dends, segment, heads), dstate):
            if totals is None:
                torch.add(dreads[i], after, out=before)
            else:
                torch.addcmul(dreads[i], after, totals[i], out=before)
            if run.delta:
                du = dwritten[i].baddbmm_(carry[i], after)
                before.baddbmm_(erase[i], du, alpha=-1)
        if self.decays_wanted and run.total is not None:
            self.dtotal = self._total_gradient(run.total)
        if run.total is not None and not self.p.exact:
            # What rescaled rows write decays to the chunk's end.
            self.dends *= run.total

    def _total_gradient(self, total: Tensor) -> Tensor:
        """Return the decay over the chunk times its gradient, (K, r V).

        Rescaled, it is what the whole state after the chunk goes through; exact, only the state
        before it does.
        """
        if self.p.exact:
            return (self.run.starts * self.dends).mul_(total)
        return self.run.ends * self.dends

    def pass_pairs(self) -> None:
        """Find the gradients of pairs, reading rows, writing rows and values."""
        run, do = self.run, self.do
        if run.delta:
            self.dvalues = torch.bmm(run.inverse.mT, self.dwritten)
            do = torch.cat([do, -self.dvalues], dim=1)
        else:
            self.dvalues = torch.bmm(run.write, self.dends)
        if run.exact_values:
            dpairs = self._exact_value_pairs()
        else:
            dpairs = torch.bmm(do, run.written.mT)
            if not run.delta:
                self.dvalues.baddbmm_(run.pairs.mT, do)
        self.ddiagonal = None
        if run.own_diagonal():
            self.ddiagonal = dpairs[:, : self.chunk].diagonal(dim1=1, dim2=2)[..., None].clone()
        self.dread = torch.bmm(do, run.starts.mT)
        self.dwrite = torch.bmm(run.written, self.dends.mT)
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
        dpairs *= run.mask()
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
        dk.addcmul_(derase, run.beta)
        v = load(p.v[self.lead], p.dtype, run.value_factor("write")).flatten(2)
        dbeta = (self.dvalues * v).sum(-1, keepdim=True)
        dbeta += (derase * load(p.k[self.lead], p.dtype)).sum(-1, keepdim=True)
        store(grads.beta[self.lead], dbeta)

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
        dv = self.dvalues * run.beta if run.delta else self.dvalues
        factor = run.value_factor("write")
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
            reads = run.read * self.dread
            if run.delta:
                reads = reads[:, : self.chunk] + reads[:, self.chunk :]
            keys = (reads, run.write * self.dwrite, dtotal.sum(2))
            if run.key_gate.read.shape[2] == 1:
                keys = tuple(x.sum(-1, keepdim=True) for x in keys)
            dg = run.key_gate.backward(*keys)
            if run.exact_keys:
                dg += self.dpair_decay
            store(grads.key_decay[self.lead], dg)
        if grads.value_decay is not None:
            self._store_value_decay(grads.value_decay[self.lead], dtotal.sum(1))

    def _store_value_decay(self, chunks: Tensor, dtotal: Tensor) -> None:
        run, shape = self.run, self.p.v.shape[4:]
        assert run.value_gate is not None
        writes = run.values * self.dvalues
        scalar = chunks.shape[5] == 1
        if scalar and shape[0] == 1 and not run.exact_values:
            # Summed over values, o do is q dq, which is at hand.
            reads = (self.queries * self.dread[:, : self.chunk]).sum(-1, keepdim=True)
            writes, dtotal = writes.sum(-1, keepdim=True), dtotal.sum(-1, keepdim=True)
        else:
            reads = torch.bmm(self.queries, run.starts)
            if not run.exact_values:
                reads.baddbmm_(run.pairs[:, : self.chunk], run.written)
            reads *= self.do
            if scalar:
                reads, writes, dtotal = (
                    x.unflatten(-1, shape).sum(-1) for x in (reads, writes, dtotal)
                )
        dg = run.value_gate.backward(reads, writes, dtotal)
        if run.exact_values:
            dg += self.dpair_value_decay
        store(chunks, dg.unflatten(2, (shape[0], -1)))
