"""One token at a time: each op for T = 1 without gradients, in a handful of calls.

Nothing the size of a state is allocated but the new state itself. These are plain tensor
operations, which a compiler can fuse.

Legend: B batch, H heads, K key dim, V value dim, D channels, N state size, W filter width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.validation import state_dtype


def is_single_step(time: int, cu_seqlens: Tensor | None, *inputs: Tensor | None) -> bool:
    """Whether this module applies: one token per row and no gradient asked for."""
    if time != 1 or cu_seqlens is not None:
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(x is not None and x.requires_grad for x in inputs)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``linear_attention`` for one token; ``state`` is left as it is."""
    dtype = state_dtype(q, k, v)
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    query, key, value = (_row(x, heads, dtype) for x in (q, k, v))
    if state is None:
        state = key.new_zeros(q.shape[0], heads, q.shape[3], v.shape[3])
    elif state.dtype != dtype:
        state = state.to(dtype)
    after = _decayed(state, log_decay, value_log_decay).view(-1, *state.shape[2:])
    if beta is not None:
        value = torch.baddbmm(value, key, after, alpha=-1)
        value *= beta.reshape(-1, 1, 1)
    after.baddbmm_(key.mT, value)
    read = after if bonus is None else state.reshape(after.shape)
    # With beta = 0 the first argument only lends its shape.
    o = torch.baddbmm(value, query, read, beta=0, alpha=scale)
    if bonus is not None:
        own = (query * key).view(-1, heads, key.shape[2]).mul(bonus).sum(-1)
        o.addcmul_(own.view(-1, 1, 1), value, value=scale)
    o = o.view(v.shape[0], 1, heads, v.shape[3])
    return o if o.dtype == v.dtype else o.to(v.dtype), after.view(state.shape)


def _row(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Bring (B, 1, heads of x, D) to (B H, 1, D)."""
    if x.dtype != dtype:
        x = x.to(dtype)
    if x.shape[2] != heads:
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
    return x.reshape(-1, 1, x.shape[3])


def _decayed(state: Tensor, log_decay: Tensor | None, value_log_decay: Tensor | None) -> Tensor:
    """Return a new, decayed state."""
    heads, after = state.shape[1], None
    if log_decay is not None:
        keys = log_decay.shape[3] if log_decay.dim() == 4 else 1
        after = state * log_decay.to(state.dtype).exp().reshape(-1, heads, keys, 1)
    if value_log_decay is not None:
        factor = value_log_decay[:, 0].to(state.dtype).exp()[:, :, None]
        after = state * factor if after is None else after.mul_(factor)
    return state.clone(memory_format=torch.contiguous_format) if after is None else after


def selective_scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``selective_scan`` for one token; ``state`` is left as it is."""
    dtype = state_dtype(u, delta, A, B, C)
    x, step, keys, queries = (t[:, 0].to(dtype) for t in (u, delta, B, C))
    after = torch.mul(step[..., None], A.to(dtype)).exp_()
    if state is None:
        after.zero_()
    else:
        after.mul_(state)
    after.addcmul_((step * x)[..., None], keys[:, None])
    y = torch.matmul(after, queries[..., None])[..., 0]
    if D is not None:
        y = torch.addcmul(y, x, D.to(dtype))
    return y[:, None].to(u.dtype), after


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute ``causal_conv1d`` for one token; ``state`` is left as it is."""
    dtype = state_dtype(x, weight)
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1)
    window = torch.cat([state.to(x.dtype), x.transpose(1, 2)], dim=2)
    y = (window.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = torch.nn.functional.silu(y)
    return y[:, None].to(x.dtype), window[..., 1:]
