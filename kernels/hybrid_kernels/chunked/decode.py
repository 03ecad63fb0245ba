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
    queries, keys, values = (_one(x, heads, dtype) for x in (q, k, v))
    if state is None:
        state = keys.new_zeros(*keys.shape, values.shape[-1])
    state = state.to(dtype)
    after = _decayed(state, log_decay, value_log_decay)
    if beta is not None:
        answered = torch.matmul(keys[:, :, None], after)[:, :, 0]
        values = (values - answered) * beta[:, 0, :, None]
    after.addcmul_(keys[..., None], values[:, :, None])
    read = after if bonus is None else state
    o = torch.matmul((queries * scale)[:, :, None], read)[:, :, 0]
    if bonus is not None:
        own = (queries * keys * bonus).sum(-1, keepdim=True) * scale
        o = torch.addcmul(o, own, values)
    return o[:, None].to(v.dtype), after


def _one(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Bring (B, 1, heads of x, D) to (B, H, D)."""
    x = x[:, 0].to(dtype)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _decayed(state: Tensor, log_decay: Tensor | None, value_log_decay: Tensor | None) -> Tensor:
    """Return a new, decayed state."""
    factors = []
    if log_decay is not None:
        g = log_decay.to(state.dtype).exp()
        g = g if g.dim() == 1 else g[:, 0]
        factors.append(g[..., None] if g.dim() == 3 else g[..., None, None])
    if value_log_decay is not None:
        factors.append(value_log_decay[:, 0].to(state.dtype).exp()[:, :, None])
    if not factors:
        return state.clone()
    after = state * factors[0]
    return after.mul_(factors[1]) if len(factors) == 2 else after


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
