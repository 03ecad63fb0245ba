"""Selective scan in segments: the elementwise work of many steps at once, one pass over time.

The state is kept as (N, D), channels innermost, so that every broadcast runs along long rows. A
step of the serial loop is a single in-place multiply-add. The backward pass recomputes each
segment from the state before it, the only thing that the forward pass keeps.

Legend: B batch, T time, D channels, N state size, S sequences (B, or packed documents), R steps x
sequences of a segment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.arguments import SelectiveScan, state_dtype
from hybrid_kernels.chunked.chunk_plan import ChunkSpan, StateCarry, accumulate, chunk_plan
from hybrid_kernels.chunked.decode import is_single_step, selective_scan_step
from hybrid_kernels.chunked.memory import Scratch
from hybrid_kernels.packing import documents
from hybrid_kernels.transforms import first_derivatives_only, without_autocast

# Elements of state x steps that a segment holds: its matrices should stay in a core's cache.
SEGMENT_ELEMENTS = 1 << 17
# At least this many steps, so that the states saved stay small beside the inputs.
SEGMENT_STEPS = 16


def selective_scan(a: SelectiveScan) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.selective_scan`` segment by segment, on any device."""
    if is_single_step(a):
        return selective_scan_step(a)
    y, final_state, _ = torch.ops.hybrid_kernels.chunked_selective_scan(*a.values())
    return y, final_state


@torch.library.custom_op("hybrid_kernels::chunked_selective_scan", mutates_args=())
@without_autocast
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the final states, and the states that the backward pass starts from."""
    scan = _Scan(u, delta, A, B, C, cu_seqlens)
    plan = scan.plan
    whole, y = plan.empty(u.shape[2:], u.dtype, u.device)
    state = scan.new_state(initial_state)
    segments = plan.segments
    saved = state.new_empty(sum(segment.width for segment in segments), *state.shape[1:])
    starts = saved.split([segment.width for segment in segments])
    carried = StateCarry(state, plan)
    for segment, start in zip(segments, starts, strict=True):
        carried.enter(start)
        part = _Part(scan, segment, carried)
        out = torch.bmm(part.C[:, None], part.after)[:, 0]
        if D is not None:
            out = torch.addcmul(out, part.u, D.to(out.dtype))
        y[segment.lead].copy_(out.view_as(y[segment.lead]))
    carried.finish()
    final_state = plan.unsort_states(state).transpose(1, 2).contiguous()
    return plan.result(whole), final_state, saved


@torch.library.custom_op("hybrid_kernels::chunked_selective_scan_backward", mutates_args=())
@without_autocast
def _backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dfinal: Tensor,
) -> list[Tensor]:
    """Return the gradients of the tensors that are not None, in order."""
    scan = _Scan(u, delta, A, B, C, cu_seqlens)
    plan = scan.plan
    memory = [plan.empty(x.shape[2:], x.dtype, x.device) for x in (u, delta, B, C)]
    dA = torch.zeros_like(scan.A)
    dD = None if D is None else torch.zeros_like(D, dtype=scan.dtype)
    dstate = scan.new_state(dfinal)
    dy_chunks = plan.chunks(dy)
    end = saved.shape[0]
    for segment in reversed(plan.segments):
        start = saved[end - segment.width : end]
        part = _Part(scan, segment, StateCarry.again(start, plan))
        dy_rows = dy_chunks[segment.lead].flatten(0, 2).to(scan.dtype)
        found = part.backward(dy_rows, dstate, dA)
        if D is not None:
            assert dD is not None
            found[0].addcmul_(dy_rows, D.to(scan.dtype))
            dD += (dy_rows * part.u).sum(0)
        for (_, chunks), grad in zip(memory, found, strict=True):
            chunks[segment.lead].copy_(grad.view_as(chunks[segment.lead]))
        end -= segment.width
    du, ddelta, dB, dC = (plan.result(whole) for whole, _ in memory)
    dinitial = plan.unsort_states(dstate).transpose(1, 2)
    found = [(u, du), (delta, ddelta), (A, dA.T), (B, dB), (C, dC), (D, dD)]
    found.append((initial_state, dinitial))
    return [grad.to(x.dtype).contiguous() for x, grad in found if x is not None]


class _Scan:
    """The inputs by steps."""

    def __init__(self, u, delta, A, B, C, cu_seqlens):
        self.dtype = state_dtype(u, delta, A, B, C)
        packed = None if cu_seqlens is None else documents(cu_seqlens, u.shape[1])
        # With chunks of one token a plan's steps are the steps of time.
        self.plan = chunk_plan(u, 1, SegmentSteps(A.numel()), packed)
        self.u, self.delta, self.B, self.C = (self.plan.chunks(x) for x in (u, delta, B, C))
        self.A = A.to(self.dtype).T.contiguous()
        self.scratch = Scratch(self.dtype, u.device)

    def new_state(self, states: Tensor | None) -> Tensor:
        """Bring (S, D, N), or zeros for None, to (S, N, D) in the order of the plan."""
        if states is None:
            return self.A.new_zeros(self.plan.sequences, *self.A.shape)
        states = states.to(self.dtype).transpose(1, 2)
        return self.plan.sort_states(states).contiguous()


class _Part:
    """One segment: its decays and its states, in memory that the next one overwrites.

    Attributes (R leading):
        u, delta: (D).
        B, C: (N).
        decays: (N, D) exp(delta A).
        before, after: (N, D) the states around each step; the two may overlap.
    """

    def __init__(self, scan: _Scan, segment: ChunkSpan, carried: StateCarry):
        self.A, self.scratch, self.widths = scan.A, scan.scratch, tuple(segment.widths)
        self.u, self.delta, self.B, self.C = (
            x[segment.lead].flatten(0, 2).to(scan.dtype)
            for x in (scan.u, scan.delta, scan.B, scan.C)
        )
        shape = tuple(scan.A.shape)
        self.decays = self.scratch.take("decays", segment.offsets[-1], *shape)
        torch.mul(self.delta[:, None], scan.A, out=self.decays).exp_()
        states = self.scratch.take("states", segment.states(1), *shape)
        self.before, self.after = segment.before_and_after(states, 1)
        befores, afters, decays = map(self._steps, (self.before, self.after, self.decays))
        carried.enter(befores[0])
        torch.mul((self.delta * self.u)[:, None], self.B[:, :, None], out=self.after)
        accumulate(befores, afters, carried, decays)

    def _steps(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut rows into those of each step."""
        return self.scratch.split(x, self.widths)

    def backward(
        self, dy: Tensor, dstate: Tensor, dA: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of u, delta, B and C; update those of the state and of A.

        The states are given up: their memory serves for products.

        Args:
            dy: (R, D).
            dstate: (S, N, D) gradient of the states after the segment; becomes that of those before.
            dA: (N, D), added to.
        """
        # Rows times a matrix: as a matrix times columns, these products take twice as long.
        dC = torch.bmm(dy[:, None], self.after.mT)[:, 0]
        dstates = self.scratch.take("dstates", *self.decays.shape)
        torch.mul(self.C[:, :, None], dy[:, None], out=dstates)
        self._pass_back(dstates, dstate)
        # What each decay multiplied, times its own value and gradient.
        through = self.before.mul_(dstates).mul_(self.decays)
        dA.add_(torch.mul(through, self.delta[:, None], out=self.decays).sum(0))
        ddelta = torch.mul(through, self.A, out=self.decays).sum(1)
        dinput = torch.bmm(self.B[:, None], dstates)[:, 0]
        ddelta.addcmul_(dinput, self.u)
        dB = torch.bmm((self.delta * self.u)[:, None], dstates.mT)[:, 0]
        return dinput.mul_(self.delta), ddelta, dB, dC

    def _pass_back(self, dstates: Tensor, dstate: Tensor) -> None:
        """Turn gradients of the states as each step reads them into the whole ones, in place."""
        widths, pieces, decays = self.widths, self._steps(dstates), self._steps(self.decays)
        pieces[-1].add_(dstate[: widths[-1]])
        for i in reversed(range(len(widths) - 1)):
            running, width = widths[i + 1], widths[i]
            if running == width:
                pieces[i].addcmul_(decays[i + 1], pieces[i + 1])
            else:
                pieces[i][:running].addcmul_(decays[i + 1], pieces[i + 1])
                pieces[i][running:].add_(dstate[running:width])
        torch.mul(decays[0], pieces[0], out=dstate[: widths[0]])


class SegmentSteps(NamedTuple):
    """The rule for how many steps a segment holds.

    Attributes:
        state: elements of the state of one sequence.
    """

    state: int

    def __call__(self, sequences: int) -> int:
        """Return the number of steps for so many sequences."""
        return max(SEGMENT_STEPS, SEGMENT_ELEMENTS // (sequences * self.state))


@_forward.register_fake
def _(u, delta, A, B, C, D, initial_state, cu_seqlens):
    if cu_seqlens is None:
        rows = u.shape[0]
        count = rows * -(-u.shape[1] // SegmentSteps(A.numel())(rows))
    else:
        rows = cu_seqlens.shape[0] - 1
        count = torch.library.get_ctx().new_dynamic_size()
    dtype = state_dtype(u, delta, A, B, C)
    return (
        u.new_empty(u.shape),
        u.new_empty(rows, *A.shape, dtype=dtype),
        u.new_empty(count, A.shape[1], A.shape[0], dtype=dtype),
    )


@_backward.register_fake
def _(u, delta, A, B, C, D, initial_state, *rest):
    found = (u, delta, A, B, C, D, initial_state)
    return [x.new_empty(x.shape) for x in found if x is not None]


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[2])


def _differentiate(ctx, dy, dfinal, _):
    *tensors, saved = ctx.saved_tensors
    found = iter(
        torch.ops.hybrid_kernels.chunked_selective_scan_backward(*tensors, saved, dy, dfinal)
    )
    return (*(None if x is None else next(found) for x in tensors[:7]), None)


_forward.register_autograd(_differentiate, setup_context=_keep)
first_derivatives_only("selective_scan", _forward, _backward)
