"""Selective scan in spans: the elementwise work of many steps at once, one pass over time.

The state is kept as (N, D), channels innermost, so that every broadcast runs along long rows. A
step of the serial loop is a single in-place multiply-add. The backward pass computes each span
again from the state before it, the only thing that the forward pass saves.

Shapes: B batch, T time, D channels, N state size, S sequences (B, or packed documents), R steps x
sequences of a span.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.arguments import SelectiveScan
from hybrid_kernels.chunked.chunk_plan import ChunkPlan, ChunkSpan, chunk_plan
from hybrid_kernels.chunked.decode import is_single_step, selective_scan_step
from hybrid_kernels.chunked.memory import Scratch
from hybrid_kernels.chunked.state_walk import StateCarry, accumulate
from hybrid_kernels.custom_ops import BackwardInputs, Wanted, custom_op
from hybrid_kernels.packing import documents

# Elements of state x steps that a span holds: its matrices should stay in a core's cache.
SPAN_ELEMENTS = 1 << 17
# At least so many steps, so that the states saved stay small beside the inputs.
SPAN_STEPS = 16


def selective_scan(a: SelectiveScan) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.selective_scan`` span by span, on any device."""
    if is_single_step(a):
        return selective_scan_step(a)
    y, final_state, _ = _scan(a)
    return y, final_state


class ScanChunks(NamedTuple):
    """The inputs by step, and their plan.

    Attributes:
        u, delta: (leading, sequences, 1, D).
        B, C: (leading, sequences, 1, N).
        A: (N, D).
        plan: with chunks of one token, so that its steps are the steps of time.
    """

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    plan: ChunkPlan


class ScanSpan(NamedTuple):
    """One span, loaded, with its decays and states; all but ``widths`` lead with R.

    Attributes:
        u, delta: (D).
        B, C: (N).
        decays: (N, D) exp(delta A).
        before, after: (N, D) the states around each step; the two may overlap.
        widths: number of sequences at each step.
    """

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    decays: Tensor
    before: Tensor
    after: Tensor
    widths: tuple[int, ...]


class SpanGradients(NamedTuple):
    """Gradients of the rows of a span: u and delta (R, D), B and C (R, N)."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor


def _forward(a: SelectiveScan, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the final states, and the states before each span."""
    x = _cut(a)
    plan = x.plan
    whole, y = plan.empty(a.u.shape[2:], a.u.dtype, a.u.device)
    state, work = _to_plan_order(x, a.initial_state), Scratch(x.A.dtype, a.u.device)
    widths = [span.width for span in plan.spans]
    saved = state.new_empty(sum(widths), *state.shape[1:])
    carry = StateCarry(state, plan)
    for span, start in zip(plan.spans, saved.split(widths), strict=True):
        carry.enter(start)
        s = _run(x, span, carry, work)
        out = torch.bmm(s.C[:, None], s.after)[:, 0]
        if a.D is not None:
            out = torch.addcmul(out, s.u, a.D.to(out.dtype))
        y[span.lead].copy_(out.view_as(y[span.lead]))
    carry.finish()
    final_state = plan.unsort_states(state).transpose(1, 2).contiguous()
    return plan.result(whole), final_state, saved


def _backward(a: SelectiveScan, given: BackwardInputs) -> tuple:
    """Return ``SelectiveScan.Gradients``."""
    x, saved = _cut(a), given.saved
    assert saved is not None
    plan, work = x.plan, Scratch(x.A.dtype, a.u.device)
    inputs = (a.u, a.delta, a.B, a.C)
    memory = [plan.empty(y.shape[2:], y.dtype, y.device) for y in inputs]
    dA = torch.zeros_like(x.A)
    dD = None if a.D is None else torch.zeros_like(a.D, dtype=a.dtype)
    dstate = _to_plan_order(x, given.grad_state)
    dy_chunks = plan.chunks(given.grad_output)
    end = saved.shape[0]
    for span in reversed(plan.spans):
        start = saved[end - span.width : end]
        s = _run(x, span, StateCarry.again(start, plan), work)
        dy = dy_chunks[span.lead].flatten(0, 2).to(a.dtype)
        grads = _span_backward(s, x.A, dy, dstate, dA, work)
        if a.D is not None:
            assert dD is not None
            grads.u.addcmul_(dy, a.D.to(a.dtype))
            dD += (dy * s.u).sum(0)
        for (_, chunks), grad in zip(memory, grads, strict=True):
            chunks[span.lead].copy_(grad.view_as(chunks[span.lead]))
        end -= span.width
    du, ddelta, dB, dC = (plan.result(whole) for whole, _ in memory)
    dinitial = plan.unsort_states(dstate).transpose(1, 2)
    grads = {"u": du, "delta": ddelta, "A": dA.T, "B": dB, "C": dC, "D": dD}
    grads["initial_state"] = dinitial
    given_inputs = a.floating()
    return SelectiveScan.Gradients(
        **{n: grads[n].to(y.dtype).contiguous() for n, y in given_inputs.items()}
    )


def _cut(a: SelectiveScan) -> ScanChunks:
    packed = None if a.cu_seqlens is None else documents(a.cu_seqlens, a.time)
    plan = chunk_plan(a.u, 1, SpanSteps(a.A.numel()), packed)
    u, delta, B, C = (plan.chunks(y) for y in (a.u, a.delta, a.B, a.C))
    return ScanChunks(u, delta, B, C, a.A.to(a.dtype).T.contiguous(), plan)


def _to_plan_order(x: ScanChunks, states: Tensor | None) -> Tensor:
    """Bring (S, D, N), or zeros for None, to (S, N, D) in the order of the plan (a copy)."""
    if states is None:
        return x.A.new_zeros(x.plan.sequences, *x.A.shape)
    states = states.to(x.A.dtype).transpose(1, 2)
    return x.plan.sort_states(states).contiguous()


def _run(x: ScanChunks, span: ChunkSpan, carry: StateCarry, work: Scratch) -> ScanSpan:
    """Load a span and pass the states through it."""
    u, delta, B, C = (y[span.lead].flatten(0, 2).to(x.A.dtype) for y in x[:4])
    decays = work.take("decays", span.offsets[-1], *x.A.shape)
    torch.mul(delta[:, None], x.A, out=decays).exp_()
    states = work.take("states", span.states(1), *x.A.shape)
    before, after = span.before_and_after(states, 1)
    widths = tuple(span.widths)
    befores, afters, step_decays = (work.split(y, widths) for y in (before, after, decays))
    carry.enter(befores[0])
    torch.mul((delta * u)[:, None], B[:, :, None], out=after)
    accumulate(befores, afters, carry, step_decays)
    return ScanSpan(u, delta, B, C, decays, before, after, widths)


def _span_backward(
    s: ScanSpan, A: Tensor, dy: Tensor, dstate: Tensor, dA: Tensor, work: Scratch
) -> SpanGradients:
    """Return the gradients of a span's rows; update those of the state and of A.

    Args:
        s: the span, whose states and decays are overwritten.
        A: (N, D).
        dy: (R, D).
        dstate: (S, N, D) gradient of the states after the span; becomes that of those before.
        dA: (N, D), added to.
        work: memory that every span overwrites.
    """
    # Rows times a matrix: as a matrix times columns, these products take twice as long.
    dC = torch.bmm(dy[:, None], s.after.mT)[:, 0]
    dstates = work.take("dstates", *s.decays.shape)
    torch.mul(s.C[:, :, None], dy[:, None], out=dstates)
    _pass_back(s, dstates, dstate, work)
    # What each decay multiplied, times its own value and gradient.
    through = s.before.mul_(dstates).mul_(s.decays)
    dA.add_(torch.mul(through, s.delta[:, None], out=s.decays).sum(0))
    ddelta = torch.mul(through, A, out=s.decays).sum(1)
    dinput = torch.bmm(s.B[:, None], dstates)[:, 0]
    ddelta.addcmul_(dinput, s.u)
    dB = torch.bmm((s.delta * s.u)[:, None], dstates.mT)[:, 0]
    return SpanGradients(dinput.mul_(s.delta), ddelta, dB, dC)


def _pass_back(s: ScanSpan, dstates: Tensor, dstate: Tensor, work: Scratch) -> None:
    """Turn gradients of the states as each step reads them into the whole ones, in place."""
    widths, parts, decays = s.widths, work.split(dstates, s.widths), work.split(s.decays, s.widths)
    parts[-1].add_(dstate[: widths[-1]])
    for i in reversed(range(len(widths) - 1)):
        running, width = widths[i + 1], widths[i]
        if running == width:
            parts[i].addcmul_(decays[i + 1], parts[i + 1])
        else:
            parts[i][:running].addcmul_(decays[i + 1], parts[i + 1])
            parts[i][running:].add_(dstate[running:width])
    torch.mul(decays[0], parts[0], out=dstate[: widths[0]])


class SpanSteps(NamedTuple):
    """The rule for how many steps a span holds.

    Attributes:
        state: elements of the state of one sequence.
    """

    state: int

    def __call__(self, sequences: int) -> int:
        """Return the number of steps for so many sequences."""
        return max(SPAN_STEPS, SPAN_ELEMENTS // (sequences * self.state))


def _fake(a: SelectiveScan, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    if a.cu_seqlens is None:
        count = a.rows * -(-a.time // SpanSteps(a.A.numel())(a.rows))
    else:
        count = torch.library.get_ctx().new_dynamic_size()
    return (
        a.u.new_empty(a.u.shape),
        a.u.new_empty(a.rows, *a.A.shape, dtype=a.dtype),
        a.u.new_empty(count, *reversed(a.A.shape), dtype=a.dtype),
    )


_scan = custom_op("chunked_selective_scan", SelectiveScan, _forward, _backward, _fake)
