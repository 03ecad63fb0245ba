"""``causal_conv1d`` in Triton: tiles of time x channels, parallel over both.

Legend: B batch, T time, D channels, W filter width, N packed documents; C rows of a tile.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.arguments import CausalConv1d
from hybrid_kernels.transforms import first_derivatives_only, without_autocast
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
    states = (a.initial_state, a.cu_seqlens)
    y = _forward(a.x, a.weight, a.bias, *states, a.activation == "silu")
    return y, _last_inputs(a.x, a.weight.shape[1] - 1, *states)


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


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    """Return y (B, T, D)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _run(x, weight, bias, initial_state, cu_seqlens, silu, y, None)
    return y


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    y: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Launch ``convolution_kernel``; ``gradients`` are dy and the shares of dweight and dbias."""
    found, cut = _tiles(x, cu_seqlens)
    channels = block(x.shape[2], found.keys)
    launch(
        convolution_kernel,
        (cut.count, triton.cdiv(x.shape[2], channels)),
        found,
        *(x, weight.contiguous(), x if bias is None else bias.contiguous()),
        *(x if initial_state is None else initial_state.contiguous(), y),
        *((x, x, x) if gradients is None else gradients),
        *cut.tables,
        *(cut.time, cut.per_row),
        D=x.shape[2],
        W=weight.shape[1],
        C=found.values,
        BD=channels,
        BIAS=bias is not None,
        SILU=silu,
        INITIAL=initial_state is not None and weight.shape[1] > 1,
        BACKWARD=gradients is not None,
        PACKED=cut.packed,
    )


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    dy: Tensor,
) -> list[Tensor]:
    """Return the gradients of the tensors that are not None, in order."""
    x, dy = x.contiguous(), dy.contiguous()
    found, cut = _tiles(x, cu_seqlens)
    dz = torch.empty_like(x, dtype=torch.float32)
    dweights = dz.new_empty(cut.count, *weight.shape)
    dbiases = dz.new_empty(cut.count, weight.shape[0])
    _run(x, weight, bias, initial_state, cu_seqlens, silu, dz, (dy, dweights, dbiases))
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
    grads = [dx, dweights.sum(0).to(weight.dtype)]
    if bias is not None:
        grads.append(dbiases.sum(0).to(bias.dtype))
    if initial_state is not None:
        grads.append(_state_gradient(dz, weight, initial_state, cu_seqlens))
    return grads


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


_forward = torch.library.custom_op(
    "hybrid_kernels::triton_causal_conv1d", without_autocast(forward), mutates_args=()
)
_backward = torch.library.custom_op(
    "hybrid_kernels::triton_causal_conv1d_backward", without_autocast(backward), mutates_args=()
)


@_forward.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu, dy):
    return [y.new_empty(y.shape) for y in (x, weight, bias, initial_state) if y is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy):
    tensors = ctx.saved_tensors
    found = iter(_backward(*tensors, ctx.silu, dy))
    return (*(None if x is None else next(found) for x in tensors[:4]), None, None)


torch.library.register_autograd(
    "hybrid_kernels::triton_causal_conv1d", _gradient, setup_context=_setup_context
)
first_derivatives_only("causal_conv1d", _forward, _backward)
