"""The definitions: one plain loop over time for each op, in any dtype including float64.

Slow on purpose. Every other backend is tested against this file.

Shapes: B batch, T time, H heads, K key dim, V value dim, D channels, N documents or state size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.arguments import CausalConv1d, LinearAttention, SelectiveScan
from hybrid_kernels.packing import document_bounds


def linear_attention(a: LinearAttention) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.linear_attention`` one step at a time; ``chunk_size`` is unused."""
    dtype, heads = a.dtype, a.heads
    q, k, values = (_each_head(x.to(dtype), heads) for x in (a.q, a.k, a.v))
    decay = _full_decay(a.log_decay, a.value_log_decay, q, values)
    beta, bonus, erase_key, erase_query = a.beta, a.bonus, a.erase_key, a.erase_query
    if beta is not None:
        beta = beta.to(dtype)
    if a.write_scale is not None:
        values = values * a.write_scale.to(dtype)[..., None]
    outputs, states = [], []
    for rows, start, stop in document_bounds(a.cu_seqlens, q.shape[0], q.shape[1]):
        state = q.new_zeros(q.shape[0], heads, q.shape[-1], values.shape[-1])
        if a.initial_state is not None:
            state = a.initial_state[rows].to(dtype)
        for t in range(start, stop):
            k_t, v_t = k[:, t], values[:, t]
            previous = state
            state = state * decay[:, t] if decay is not None else state
            if beta is not None:
                # The delta rule writes only what the decayed state does not already answer.
                v_t = beta[:, t, :, None] * (v_t - _read(k_t, state))
            if erase_key is not None and erase_query is not None:
                a_t, b_t = erase_key[:, t].to(dtype), erase_query[:, t].to(dtype)
                state = state + a_t[..., :, None] * _read(b_t, state)[..., None, :]
            state = state + k_t[..., :, None] * v_t[..., None, :]
            read = state
            if bonus is not None:
                read = previous + (bonus.to(dtype) * k_t)[..., :, None] * v_t[..., None, :]
            outputs.append(a.scale * _read(q[:, t], read))
        states.append(state)
    o = torch.stack(outputs, dim=1) if outputs else values
    return o.to(a.v.dtype), torch.cat(states)


def _read(x: Tensor, state: Tensor) -> Tensor:
    """Return x^T S for (B, H, K) and (B, H, K, V).

    Not as a matrix product, which autocast would round, in ``backward()`` as well.
    """
    return (x[..., :, None] * state).sum(-2)


def _each_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def _full_decay(
    log_decay: Tensor | None, value_log_decay: Tensor | None, q: Tensor, v: Tensor
) -> Tensor | None:
    """Return exp of all log decays as something that broadcasts to (B, T, H, K, V)."""
    decay = None
    if log_decay is not None:
        log_decay = log_decay.to(q.dtype)
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(q.shape[:3])
        if log_decay.dim() == 3:
            log_decay = log_decay[..., None]
        decay = log_decay.exp()[..., :, None]
    if value_log_decay is not None:
        value_decay = value_log_decay.to(q.dtype).exp()[..., None, :]
        decay = value_decay if decay is None else decay * value_decay
    return decay


def causal_conv1d(a: CausalConv1d) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.causal_conv1d`` one step at a time."""
    x, bias, dtype = a.x, a.bias, a.dtype
    width = a.weight.shape[1]
    inputs, weight = x.to(dtype), a.weight.to(dtype)
    outputs, states = [], []
    for rows, start, stop in document_bounds(a.cu_seqlens, x.shape[0], x.shape[1]):
        window = inputs.new_zeros(x.shape[0], x.shape[2], width - 1)
        if a.initial_state is not None:
            window = a.initial_state[rows].to(dtype)
        for t in range(start, stop):
            window = torch.cat([window, inputs[:, t, :, None]], dim=-1)
            y_t = (window * weight).sum(-1)
            window = window[..., 1:]
            if bias is not None:
                y_t = y_t + bias.to(dtype)
            outputs.append(_silu(y_t) if a.activation == "silu" else y_t)
        states.append(window)
    y = torch.stack(outputs, dim=1) if outputs else inputs
    return y.to(x.dtype), torch.cat(states).to(x.dtype)


def _silu(x: Tensor) -> Tensor:
    """SiLU without a gradient where x is not finite, which would make NaN of a gradient of 0."""
    finite = torch.isfinite(x)
    y = torch.nn.functional.silu(torch.where(finite, x, 0))
    return torch.where(finite, y, torch.nn.functional.silu(x.detach()))


def selective_scan(a: SelectiveScan) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.selective_scan`` one step at a time."""
    u, dtype = a.u, a.dtype
    inputs, delta, A, B, C = (x.to(dtype) for x in (u, a.delta, a.A, a.B, a.C))
    outputs, states = [], []
    for rows, start, stop in document_bounds(a.cu_seqlens, u.shape[0], u.shape[1]):
        state = inputs.new_zeros(u.shape[0], *A.shape)
        if a.initial_state is not None:
            state = a.initial_state[rows].to(dtype)
        for t in range(start, stop):
            step = delta[:, t, :, None]
            state = (step * A).exp() * state + step * B[:, t, None] * inputs[:, t, :, None]
            outputs.append((state * C[:, t, None]).sum(-1))
        states.append(state)
    y = torch.stack(outputs, dim=1) if outputs else inputs
    if a.D is not None:
        y = y + inputs * a.D.to(dtype)
    return y.to(u.dtype), torch.cat(states)
