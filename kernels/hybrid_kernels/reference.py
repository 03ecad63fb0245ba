"""The definitions: one plain loop over time for each op, in any dtype including float64.

Slow on purpose. Every other backend is tested against this file.

Legend: B batch, T time, H heads, K key dim, V value dim, D channels, N documents or state size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.packing import document_bounds
from hybrid_kernels.validation import state_dtype


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    write_scale: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.linear_attention`` one step at a time; ``chunk_size`` is unused."""
    dtype = state_dtype(q, k, v)
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    q, k, values = (_each_head(x.to(dtype), heads) for x in (q, k, v))
    decay = _full_decay(log_decay, value_log_decay, q, values)
    if beta is not None:
        beta = beta.to(dtype)
    if write_scale is not None:
        values = values * write_scale.to(dtype)[..., None]
    outputs, states = [], []
    for rows, start, stop in document_bounds(cu_seqlens, q.shape[0], q.shape[1]):
        state = q.new_zeros(q.shape[0], heads, q.shape[-1], values.shape[-1])
        if initial_state is not None:
            state = initial_state[rows].to(dtype)
        for t in range(start, stop):
            k_t, v_t = k[:, t], values[:, t]
            previous = state
            state = state * decay[:, t] if decay is not None else state
            if beta is not None:
                # The delta rule writes only what the decayed state does not already answer.
                v_t = beta[:, t, :, None] * (v_t - _read(k_t, state))
            state = state + k_t[..., :, None] * v_t[..., None, :]
            read = state
            if bonus is not None:
                read = previous + (bonus.to(dtype) * k_t)[..., :, None] * v_t[..., None, :]
            outputs.append(scale * _read(q[:, t], read))
        states.append(state)
    o = torch.stack(outputs, dim=1) if outputs else values
    return o.to(v.dtype), torch.cat(states)


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


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.causal_conv1d`` one step at a time."""
    dtype = state_dtype(x, weight)
    width = weight.shape[1]
    inputs, weight = x.to(dtype), weight.to(dtype)
    outputs, states = [], []
    for rows, start, stop in document_bounds(cu_seqlens, x.shape[0], x.shape[1]):
        window = inputs.new_zeros(x.shape[0], x.shape[2], width - 1)
        if initial_state is not None:
            window = initial_state[rows].to(dtype)
        for t in range(start, stop):
            window = torch.cat([window, inputs[:, t, :, None]], dim=-1)
            y_t = (window * weight).sum(-1)
            window = window[..., 1:]
            if bias is not None:
                y_t = y_t + bias.to(dtype)
            outputs.append(_silu(y_t) if activation == "silu" else y_t)
        states.append(window)
    y = torch.stack(outputs, dim=1) if outputs else inputs
    return y.to(x.dtype), torch.cat(states).to(x.dtype)


def _silu(x: Tensor) -> Tensor:
    """SiLU without a gradient where x is not finite, which would make NaN of a gradient of 0."""
    finite = torch.isfinite(x)
    y = torch.nn.functional.silu(torch.where(finite, x, 0))
    return torch.where(finite, y, torch.nn.functional.silu(x.detach()))


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.selective_scan`` one step at a time."""
    dtype = state_dtype(u, delta, A, B, C)
    inputs, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    outputs, states = [], []
    for rows, start, stop in document_bounds(cu_seqlens, u.shape[0], u.shape[1]):
        state = inputs.new_zeros(u.shape[0], *A.shape)
        if initial_state is not None:
            state = initial_state[rows].to(dtype)
        for t in range(start, stop):
            step = delta[:, t, :, None]
            state = (step * A).exp() * state + step * B[:, t, None] * inputs[:, t, :, None]
            outputs.append((state * C[:, t, None]).sum(-1))
        states.append(state)
    y = torch.stack(outputs, dim=1) if outputs else inputs
    if D is not None:
        y = y + inputs * D.to(dtype)
    return y.to(u.dtype), torch.cat(states)
