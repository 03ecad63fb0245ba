"""``causal_conv1d`` in Triton: tiles of time x channels, parallel over both.

Shapes: B batch, T time, D channels, W filter width, N packed documents; C rows of a tile.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.arguments import CausalConv1d
from hybrid_kernels.custom_ops import BackwardInputs, Wanted, custom_op
from hybrid_kernels.triton.blocks import kernel, load_rows, locate, row_mask, store_rows
from hybrid_kernels.triton.launch import Config, block, config, launch
from hybrid_kernels.triton.layout import Chunks, chunks


@triton.jit
def load_taps(
    p_x,
    p_state,
    i_n,
    row,
    rows,
    before,
    tap,
    D: tl.constexpr,
    d0,
    W: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    INITIAL: tl.constexpr,
):
    """Load the input that tap ``tap`` meets at each row; rows before the first are the state's."""
    o_t = tl.arange(0, C)[:, None] + (tap - (W - 1))
    o_d = (d0 + tl.arange(0, BD))[None, :]
    m_row = row_mask(rows, D, d0, C, BD)
    m_past = o_t + before < 0
    b_x = tl.load(p_x + (row + o_t) * D + o_d, mask=m_row & (m_past == 0), other=0.0)
    b_x = b_x.to(tl.float32)
    if INITIAL:
        p_past = p_state + (i_n * D + o_d) * (W - 1) + o_t + before + (W - 1)
        b_x += tl.load(p_past, mask=m_row & m_past, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def load_tap_weight(p_weight, tap, D, d0, W: tl.constexpr, BD: tl.constexpr):
    """Load the weight of one tap for BD channels, as a row."""
    o_d = d0 + tl.arange(0, BD)
    return tl.load(p_weight + o_d * W + tap, mask=o_d < D, other=0.0).to(tl.float32)[None, :]


@kernel
def convolution_kernel(
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_y,
    p_dy,
    p_dweight,
    p_dbias,
    p_offsets,
    p_first,
    p_owner,
    T,
    NT,
    D: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    INITIAL: tl.constexpr,
    BACKWARD: tl.constexpr,
    PACKED: tl.constexpr,
):
    """y_t = act(bias + sum_w weight_w x_{t-W+1+w}); BACKWARD, the gradient before act into y.

    Grid (tiles, blocks of D). BACKWARD also writes each tile's share of dweight (tiles, D, W) and
    of dbias (tiles, D).
    """
    i_tile = tl.program_id(0)
    d0 = tl.program_id(1) * BD
    row, rows = locate(i_tile, p_offsets, p_first, p_owner, T, NT, C, PACKED)
    if PACKED:
        i_n = tl.load(p_owner + i_tile)
        before = (i_tile - tl.load(p_first + i_n)) * C
    else:
        i_n = (i_tile // NT).to(tl.int64)
        before = i_tile % NT * C
    o_d = d0 + tl.arange(0, BD)
    b_y = tl.zeros((C, BD), dtype=tl.float32)
    if BIAS:
        b_y += tl.load(p_bias + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(W):
        b_x = load_taps(p_x, p_state, i_n, row, rows, before, tap, D, d0, W, C, BD, INITIAL)
        b_y += b_x * load_tap_weight(p_weight, tap, D, d0, W, BD)
    if BACKWARD:
        b_dy = load_rows(p_dy, row, rows, 0, 1, D, d0, C, BD)
        if SILU:
            b_gate = tl.sigmoid(b_y)
            # No gradient where the input is not finite: 0 * NaN would reach the tokens before.
            b_slope = b_gate * (1.0 + b_y * (1.0 - b_gate))
            b_dy *= tl.where(tl.abs(b_y) < float("inf"), b_slope, 0.0)
        store_rows(p_y, b_dy, row, rows, 0, 1, D, d0, C, BD)
        i_part = i_tile.to(tl.int64) * D + o_d
        tl.store(p_dbias + i_part, tl.sum(b_dy, axis=0), mask=o_d < D)
        for tap in tl.static_range(W):
            b_x = load_taps(p_x, p_state, i_n, row, rows, before, tap, D, d0, W, C, BD, INITIAL)
            tl.store(p_dweight + i_part * W + tap, tl.sum(b_dy * b_x, axis=0), mask=o_d < D)
    else:
        if SILU:
            b_y *= tl.sigmoid(b_y)
        store_rows(p_y, b_y, row, rows, 0, 1, D, d0, C, BD)


@kernel
def convolution_inputs_kernel(
    p_dz,
    p_weight,
    p_dx,
    p_offsets,
    p_first,
    p_owner,
    T,
    NT,
    D: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dx_t = sum_w weight_w dz_{t+W-1-w} within the sequence. Grid (tiles, blocks of D)."""
    d0 = tl.program_id(1) * BD
    row, rows = locate(tl.program_id(0), p_offsets, p_first, p_owner, T, NT, C, PACKED)
    b_dx = tl.zeros((C, BD), dtype=tl.float32)
    for tap in tl.static_range(W):
        ahead = W - 1 - tap
        b_dz = load_rows(p_dz, row + ahead, rows - ahead, 0, 1, D, d0, C, BD)
        b_dx += b_dz * load_tap_weight(p_weight, tap, D, d0, W, BD)
    store_rows(p_dx, b_dx, row, rows, 0, 1, D, d0, C, BD)


def causal_conv1d(a: CausalConv1d) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.causal_conv1d``."""
    history = a.weight.shape[1] - 1
    return _convolution(a), _last_inputs(a.x, history, a.initial_state, a.cu_seqlens)


def _bounds(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the first row of each sequence in (B * T, D), and the row after its last."""
    if cu_seqlens is not None:
        offsets = cu_seqlens.to(device=x.device, dtype=torch.int64)
        return offsets[:-1], offsets[1:]
    first = torch.arange(x.shape[0], device=x.device) * x.shape[1]
    return first, first + x.shape[1]


def _last_inputs(
    x: Tensor, history: int, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Return the last ``history`` inputs of each sequence (N, D, W-1), from the state if short."""
    if cu_seqlens is None:
        time = x.shape[1]
        recent = x[:, max(0, time - history) :].transpose(1, 2)
        if time >= history:
            return recent.contiguous()
        if initial_state is None:
            initial_state = x.new_zeros(x.shape[0], x.shape[2], history)
        return torch.cat([initial_state[:, :, time:].to(x.dtype), recent], dim=2)
    first, end = _bounds(x, cu_seqlens)
    past = torch.arange(-history, 0, device=x.device)
    rows = end[:, None] + past
    if initial_state is None:
        initial_state = x.new_zeros(first.shape[0], x.shape[2], history)
    older = (past + history + (end - first)[:, None]).clamp(max=max(history - 1, 0))
    older = initial_state.to(x.dtype).gather(2, older[:, None].expand(-1, x.shape[2], -1))
    if x.shape[1] == 0:
        return older
    recent = x.flatten(0, 1)[rows.clamp(min=0)].transpose(1, 2)
    return torch.where((rows >= first[:, None])[:, None], recent, older)


def _tiles(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Config, Chunks]:
    found = config("convolution", x.device, tl.float32)
    return found, chunks(x, cu_seqlens, found.values)


def forward(a: CausalConv1d, wanted: Wanted) -> Tensor:
    """Return y (B, T, D)."""
    x = a.x.contiguous()
    y = torch.empty_like(x)
    _run(a, x, y, None)
    return y


def _run(
    a: CausalConv1d, x: Tensor, y: Tensor, gradients: tuple[Tensor, Tensor, Tensor] | None
) -> None:
    """Launch ``convolution_kernel``; ``gradients`` are dy and the shares of dweight and dbias."""
    found, cut = _tiles(x, a.cu_seqlens)
    channels, width = block(x.shape[2], found.keys), a.weight.shape[1]
    bias, initial = (x if t is None else t.contiguous() for t in (a.bias, a.initial_state))
    launch(
        convolution_kernel,
        (cut.count, triton.cdiv(x.shape[2], channels)),
        found,
        *(x, a.weight.contiguous(), bias, initial, y),
        *((x, x, x) if gradients is None else gradients),
        *cut.tables,
        *(cut.time, cut.per_row),
        D=x.shape[2],
        W=width,
        C=found.values,
        BD=channels,
        BIAS=a.bias is not None,
        SILU=a.activation == "silu",
        INITIAL=a.initial_state is not None and width > 1,
        BACKWARD=gradients is not None,
        PACKED=cut.packed,
    )


def backward(a: CausalConv1d, given: BackwardInputs) -> tuple:
    """Return ``CausalConv1d.Gradients``."""
    x, dy, weight, bias = a.x.contiguous(), given.grad_output.contiguous(), a.weight, a.bias
    found, cut = _tiles(x, a.cu_seqlens)
    dz = torch.empty_like(x, dtype=torch.float32)
    dweights = dz.new_empty(cut.count, *weight.shape)
    dbiases = dz.new_empty(cut.count, weight.shape[0])
    _run(a, x, dz, (dy, dweights, dbiases))
    dx = torch.empty_like(x)
    channels = block(x.shape[2], found.keys)
    launch(
        convolution_inputs_kernel,
        (cut.count, triton.cdiv(x.shape[2], channels)),
        found,
        *(dz, weight.contiguous(), dx),
        *cut.tables,
        *(cut.time, cut.per_row),
        D=x.shape[2],
        W=weight.shape[1],
        C=found.values,
        BD=channels,
        PACKED=cut.packed,
    )
    dstate = a.initial_state
    if dstate is not None:
        dstate = _state_gradient(dz, weight, dstate, a.cu_seqlens)
    return CausalConv1d.Gradients(
        x=dx,
        weight=dweights.sum(0).to(weight.dtype),
        bias=None if bias is None else dbiases.sum(0).to(bias.dtype),
        initial_state=dstate,
    )


def _state_gradient(
    dz: Tensor, weight: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Return sum over w <= s of weight_w dz_{s-w} for entry s of each state."""
    grad = torch.zeros_like(initial_state, dtype=torch.float32)
    if dz.shape[1] == 0:
        return grad.to(initial_state.dtype)
    first, end = _bounds(dz, cu_seqlens)
    flat = dz.flatten(0, 1)
    for entry in range(grad.shape[2]):
        for tap in range(entry + 1):
            rows = first + (entry - tap)
            inside = (rows < end)[:, None]
            picked = torch.where(inside, flat[rows.clamp(max=flat.shape[0] - 1)], 0.0)
            grad[:, :, entry] += picked * weight[:, tap].float()
    return grad.to(initial_state.dtype)


def _fake(a: CausalConv1d, wanted: Wanted) -> Tensor:
    return torch.empty_like(a.x, memory_format=torch.contiguous_format)


_convolution = custom_op(
    "triton_causal_conv1d", CausalConv1d, forward, backward, _fake, results="Tensor"
)
