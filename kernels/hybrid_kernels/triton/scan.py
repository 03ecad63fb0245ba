"""``selective_scan`` in Triton: a walk over time in chunks, an associative scan inside each.

A program holds the states of a block of channels and takes one chunk a step. All factors are
products of decays, which are at most 1; nothing is divided and no decay's gradient is a difference
of sums. The forward pass keeps the state before every chunk, the backward pass does each chunk
again from there.

Shapes: T time, D channels, N state size, C rows of a chunk, S sequences (rows of the batch, or
packed documents), R chunks in all. The op's own A, B, C and D are a, b, c and skip here. ``b_`` is
a block in registers, ``p_`` a pointer, ``m_`` a mask.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.arguments import SelectiveScan
from hybrid_kernels.custom_ops import BackwardInputs, Wanted, custom_op
from hybrid_kernels.triton.blocks import (
    kernel,
    load_rows,
    load_tile,
    load_vector,
    sequence,
    store_rows,
    store_tile,
)
from hybrid_kernels.triton.launch import config, launch
from hybrid_kernels.triton.layout import chunks, counts

# States of a channel that one program holds; published models have 16.
STATES = 16


@triton.jit
def compose(decay_1, write_1, decay_2, write_2):
    """Return one step h -> decay * h + write that does two, the first one first."""
    return decay_1 * decay_2, write_1 * decay_2 + write_2


@triton.jit
def load_decays(p_delta, b_a, row, rows, D, d0, C: tl.constexpr, BD: tl.constexpr):
    """Return step sizes (C, BD) and exp(delta a) (C, BD, BN); a row outside ``rows`` has 0 and 1."""
    b_delta = load_rows(p_delta, row, rows, 0, 1, D, d0, C, BD)
    return b_delta, tl.exp(b_delta[:, :, None] * b_a[None, :, :])


@triton.jit
def load_skip(p_skip, i_block, D, d0, BD: tl.constexpr):
    """Load the skip connection of BD channels; only the first block of N adds it."""
    return load_vector(p_skip, 0, tl.where(i_block == 0, D, 0), d0, BD)


@triton.jit
def states_after(b_decay, b_write, b_state, C: tl.constexpr):
    """Return the state after each row (C, BD, BN), from the one before the first."""
    m_first = (tl.arange(0, C) == 0)[:, None, None]
    b_write += tl.where(m_first, b_decay * b_state[None, :, :], 0.0)
    return tl.associative_scan((b_decay, b_write), 0, compose)[1]


@triton.jit
def row_of(b_x, i, C: tl.constexpr):
    """Return row ``i`` of a (C, BD, BN) block."""
    return tl.sum(tl.where((tl.arange(0, C) == i)[:, None, None], b_x, 0.0), axis=0)


@kernel
def scan_forward_kernel(
    p_u,
    p_delta,
    p_a,
    p_b,
    p_c,
    p_skip,
    p_initial,
    p_y,
    p_states,
    p_final,
    p_offsets,
    p_first,
    T,
    NT,
    total_rows,
    D: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    SKIP: tl.constexpr,
    INITIAL: tl.constexpr,
    KEEP: tl.constexpr,
    PACKED: tl.constexpr,
):
    """h_t = exp(delta_t a) h_{t-1} + delta_t u_t b_t; y_t = h_t c_t + skip u_t.

    Grid (S, blocks of D, blocks of N). Writes y (blocks of N, rows, D), to be summed, the final
    states (S, D, N) and, with KEEP, the states before each chunk (R, D, N).
    """
    i_n = tl.program_id(0)
    d0 = tl.program_id(1) * BD
    i_block = tl.program_id(2)
    n0 = i_block * BN
    part = i_block.to(tl.int64) * total_rows * D
    i_state = i_n.to(tl.int64)
    start, stop, chunk, count = sequence(i_n, p_offsets, p_first, T, NT, PACKED)
    b_a = load_tile(p_a, 0, D, N, d0, n0, BD, BN)
    b_state = tl.zeros((BD, BN), dtype=tl.float32)
    if INITIAL:
        b_state += load_tile(p_initial, i_state, D, N, d0, n0, BD, BN)
    for i in range(0, count):
        row = start + i * C
        rows = (stop - row).to(tl.int32)
        if KEEP:
            store_tile(p_states, b_state, chunk + i, D, N, d0, n0, BD, BN)
        b_u = load_rows(p_u, row, rows, 0, 1, D, d0, C, BD)
        b_delta, b_decay = load_decays(p_delta, b_a, row, rows, D, d0, C, BD)
        b_b = load_rows(p_b, row, rows, 0, 1, N, n0, C, BN)
        b_c = load_rows(p_c, row, rows, 0, 1, N, n0, C, BN)
        b_write = (b_delta * b_u)[:, :, None] * b_b[:, None, :]
        b_states = states_after(b_decay, b_write, b_state, C)
        b_state = row_of(b_states, C - 1, C)
        b_y = tl.sum(b_states * b_c[:, None, :], axis=2)
        if SKIP:
            b_y += b_u * load_skip(p_skip, i_block, D, d0, BD)[None, :]
        store_rows(p_y + part, b_y, row, rows, 0, 1, D, d0, C, BD)
    store_tile(p_final, b_state, i_state, D, N, d0, n0, BD, BN)


@kernel
def scan_backward_kernel(
    p_u,
    p_delta,
    p_a,
    p_b,
    p_c,
    p_skip,
    p_states,
    p_dy,
    p_dfinal,
    p_du,
    p_ddelta,
    p_da,
    p_db,
    p_dc,
    p_dskip,
    p_dinitial,
    p_offsets,
    p_first,
    T,
    NT,
    total_rows,
    D: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    SKIP: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dh_t = c_t dy_t + exp(delta_{t+1} a) dh_{t+1}, and what each input gets of it.

    Grid as in the forward pass. Writes, to be summed over their first dimension, du and ddelta
    (blocks of N, rows, D), db and dc (blocks of D, rows, N), da (S, D, N) and, with SKIP, dskip
    (S, D); and dinitial (S, D, N).
    """
    i_n = tl.program_id(0)
    d0 = tl.program_id(1) * BD
    i_block = tl.program_id(2)
    n0 = i_block * BN
    part_d = i_block.to(tl.int64) * total_rows * D
    part_n = tl.program_id(1).to(tl.int64) * total_rows * N
    i_state = i_n.to(tl.int64)
    start, stop, chunk, count = sequence(i_n, p_offsets, p_first, T, NT, PACKED)
    b_a = load_tile(p_a, 0, D, N, d0, n0, BD, BN)
    b_dstate = load_tile(p_dfinal, i_state, D, N, d0, n0, BD, BN)
    b_da = tl.zeros((BD, BN), dtype=tl.float32)
    b_dskip = tl.zeros((BD,), dtype=tl.float32)
    o_t = tl.arange(0, C)[:, None, None]
    o_before = tl.broadcast_to(tl.maximum(o_t - 1, 0), (C, BD, BN))
    for step in range(0, count):
        i = count - 1 - step
        row = start + i * C
        rows = (stop - row).to(tl.int32)
        b_u = load_rows(p_u, row, rows, 0, 1, D, d0, C, BD)
        b_dy = load_rows(p_dy, row, rows, 0, 1, D, d0, C, BD)
        b_b = load_rows(p_b, row, rows, 0, 1, N, n0, C, BN)
        b_c = load_rows(p_c, row, rows, 0, 1, N, n0, C, BN)
        b_delta, b_decay = load_decays(p_delta, b_a, row, rows, D, d0, C, BD)
        # The gradient of each state: its own read, and what the next row passes back.
        rows_next = tl.minimum(rows, C) - 1
        _, b_passed = load_decays(p_delta, b_a, row + 1, rows_next, D, d0, C, BD)
        b_dstates = b_dy[:, :, None] * b_c[:, None, :]
        b_dstates += tl.where(o_t == C - 1, b_dstate[None, :, :], 0.0)
        b_dstates = tl.associative_scan((b_passed, b_dstates), 0, compose, reverse=True)[1]
        b_dstate = row_of(b_dstates * b_decay, 0, C)
        # The states, and what each decay multiplied.
        b_state = load_tile(p_states, chunk + i, D, N, d0, n0, BD, BN)
        b_write = (b_delta * b_u)[:, :, None] * b_b[:, None, :]
        b_states = states_after(b_decay, b_write, b_state, C)
        b_dc = tl.sum(b_states * b_dy[:, :, None], axis=1)
        store_rows(p_dc + part_n, b_dc, row, rows, 0, 1, N, n0, C, BN)
        b_before = tl.gather(b_states, o_before, axis=0)
        b_before = tl.where(o_t == 0, b_state[None, :, :], b_before)
        b_through = b_before * b_decay * b_dstates
        b_da += tl.sum(b_through * b_delta[:, :, None], axis=0)
        b_dinput = tl.sum(b_dstates * b_b[:, None, :], axis=2)
        b_ddelta = tl.sum(b_through * b_a[None, :, :], axis=2) + b_dinput * b_u
        b_db = tl.sum(b_dstates * (b_delta * b_u)[:, :, None], axis=1)
        store_rows(p_db + part_n, b_db, row, rows, 0, 1, N, n0, C, BN)
        store_rows(p_ddelta + part_d, b_ddelta, row, rows, 0, 1, D, d0, C, BD)
        b_du = b_dinput * b_delta
        if SKIP:
            b_dskip += tl.sum(b_dy * b_u, axis=0)
            b_du += b_dy * load_skip(p_skip, i_block, D, d0, BD)[None, :]
        store_rows(p_du + part_d, b_du, row, rows, 0, 1, D, d0, C, BD)
    store_tile(p_da, b_da, i_state, D, N, d0, n0, BD, BN)
    store_tile(p_dinitial, b_dstate, i_state, D, N, d0, n0, BD, BN)
    if SKIP:
        # The same in every block of N, and so is what they write.
        store_rows(p_dskip, b_dskip[None, :], i_state, 1, 0, 1, D, d0, 1, BD)


def selective_scan(a: SelectiveScan) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.selective_scan``."""
    y, final, _ = _scan(a)
    return y, final


def chunk_rows(u: Tensor) -> int:
    """Return the rows of a chunk, in both passes: one keeps the states that the other needs."""
    return 1 if u.shape[1] == 1 else config("scan_forward", u.device, tl.float32).values


class Scan:
    """What both passes share: contiguous inputs, block sizes, chunks, the grid."""

    def __init__(self, kernel: str, inputs: SelectiveScan):
        sequences = (inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C)
        self.inputs = [x.contiguous() for x in sequences]
        u, _, a, _, _ = self.inputs
        self.u, self.a = u, a
        self.config = found = config(kernel, u.device, tl.float32)
        channels = min(found.keys, triton.next_power_of_2(max(1, u.shape[2])))
        states = min(STATES, triton.next_power_of_2(a.shape[1]))
        self.chunk = chunk_rows(u)
        self.chunks = chunks(u, inputs.cu_seqlens, self.chunk)
        self.blocks_d = triton.cdiv(u.shape[2], channels)
        self.blocks_n = triton.cdiv(a.shape[1], states)
        self.grid = (self.chunks.sequences, self.blocks_d, self.blocks_n)
        self.counts = (self.chunks.time, self.chunks.per_row, u.shape[0] * u.shape[1])
        self.common = {
            "D": u.shape[2],
            "N": a.shape[1],
            "C": self.chunk,
            "BD": channels,
            "BN": states,
            "PACKED": self.chunks.packed,
        }

    def states(self, count: int) -> Tensor:
        """Return memory for ``count`` states."""
        return self.u.new_empty(count, *self.a.shape, dtype=torch.float32)

    def parts(self, x: Tensor, blocks: int) -> Tensor:
        """Return memory for what ``blocks`` programs add to a tensor like ``x``."""
        return x.new_empty(blocks, *x.shape, dtype=x.dtype if blocks == 1 else torch.float32)


def total(parts: Tensor, x: Tensor) -> Tensor:
    """Sum the parts that programs wrote, in the dtype of ``x``."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(x.dtype)


def forward(a: SelectiveScan, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the final states and, for a backward pass, the states before each chunk (or none)."""
    u, D, initial_state = a.u, a.D, a.initial_state
    scan = Scan("scan_forward", a)
    y = scan.parts(scan.u, scan.blocks_n)
    states = scan.states(scan.chunks.count if wanted else 0)
    final = scan.states(scan.chunks.sequences)
    skip, initial = (u if x is None else x.contiguous() for x in (D, initial_state))
    launch(
        scan_forward_kernel,
        scan.grid,
        scan.config,
        *(*scan.inputs, skip, initial, y, states, final),
        *scan.chunks.tables[:2],
        *scan.counts,
        SKIP=D is not None,
        INITIAL=initial_state is not None,
        KEEP=bool(wanted),
        **scan.common,
    )
    return total(y, u), final, states


def backward(a: SelectiveScan, given: BackwardInputs) -> tuple:
    """Return ``SelectiveScan.Gradients``."""
    u, D, initial_state = a.u, a.D, a.initial_state
    scan = Scan("scan_backward", a)
    du, ddelta = (scan.parts(x, scan.blocks_n) for x in scan.inputs[:2])
    db, dc = (scan.parts(x, scan.blocks_d) for x in scan.inputs[3:])
    da, dinitial = (scan.states(scan.chunks.sequences) for _ in range(2))
    dskip = u.new_empty(scan.chunks.sequences, u.shape[2], dtype=torch.float32)
    dfinal = given.grad_state
    dfinal = torch.zeros_like(dinitial) if dfinal is None else dfinal.contiguous()
    launch(
        scan_backward_kernel,
        scan.grid,
        scan.config,
        *(*scan.inputs, u if D is None else D.contiguous(), given.saved),
        *(given.grad_output.contiguous(), dfinal, du, ddelta, da, db, dc, dskip, dinitial),
        *scan.chunks.tables[:2],
        *scan.counts,
        SKIP=D is not None,
        **scan.common,
    )
    return SelectiveScan.Gradients(
        u=total(du, u),
        delta=total(ddelta, a.delta),
        A=da.sum(0).to(a.A.dtype),
        B=total(db, a.B),
        C=total(dc, a.C),
        D=None if D is None else dskip.sum(0).to(D.dtype),
        initial_state=None if initial_state is None else dinitial.to(initial_state.dtype),
    )


def _fake(a: SelectiveScan, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    u = a.u
    sequences, count = counts(u, a.cu_seqlens, chunk_rows(u))
    sizes = (sequences, count if wanted else 0)
    final, states = (u.new_empty(n, *a.A.shape, dtype=torch.float32) for n in sizes)
    return torch.empty_like(u, memory_format=torch.contiguous_format), final, states


_scan = custom_op("triton_selective_scan", SelectiveScan, forward, backward, _fake)
