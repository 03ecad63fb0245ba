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
    """Compute ``linear_attention`` for one token; ``state`` is left as it is.

    Beside the new state and the output, only factors of a row are allocated: exp of the decay, and
    what of the inputs has to be cast or repeated.
    """
    dtype = state_dtype(q, k, v)
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    query, key, value = _row(q, heads, dtype), _row(k, heads, dtype), _row(v, heads, dtype)
    if state is None:
        state = key.new_zeros(q.shape[0], heads, q.shape[3], v.shape[3])
    state = _cast(state, dtype)
    final_state = _decayed(state, log_decay, value_log_decay)
    after = final_state.view(-1, q.shape[3], v.shape[3])
    if beta is not None:
        value = torch.baddbmm(value, key, after, alpha=-1)
        torch.mul(value, beta.reshape(-1, 1, 1), out=value)
    after.baddbmm_(key.mT, value)
    if beta is not None:
        # The row that was written has served: the output goes there.
        o = value.baddbmm_(query, after, beta=0, alpha=scale)
    else:
        # With beta = 0 the first argument only lends its shape.
        read = after if bonus is None else state.reshape(after.shape)
        o = torch.baddbmm(value, query, read, beta=0, alpha=scale)
    if bonus is not None:
        own = (query * key).view(-1, heads, key.shape[2]).mul(bonus).sum(-1)
        o.addcmul_(own.view(-1, 1, 1), value, value=scale)
    o = o.view(-1, 1, heads, v.shape[3])
    return _cast(o, v.dtype), final_state


def _row(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Bring (B, 1, heads of x, D) to (B H, 1, D)."""
    batch, _, own, size = x.shape
    if own != heads:
        x = x.reshape(batch, own, 1, size).expand(-1, -1, heads // own, -1)
    return _cast(x, dtype).reshape(-1, 1, size)


def _decayed(state: Tensor, log_decay: Tensor | None, value_log_decay: Tensor | None) -> Tensor:
    """Return a new, decayed state, contiguous."""
    heads, after = state.shape[1], None
    if not state.is_contiguous():
        state = state.contiguous()
    if log_decay is not None:
        keys = log_decay.shape[3] if log_decay.dim() == 4 else 1
        factor = _cast(log_decay, state.dtype).exp()
        after = torch.mul(state, factor.reshape(-1, heads, keys, 1))
    if value_log_decay is not None:
        factor = value_log_decay[:, 0].to(state.dtype).exp()[:, :, None]
        after = state * factor if after is None else after.mul_(factor)
    return state.clone() if after is None else after


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
    x, step, A, keys, queries = (_cast(t, dtype) for t in (u, delta, A, B, C))
    # (B, 1, D) turned is (B, D, 1), and (B, 1, N) is what a row of the state is multiplied by.
    after = torch.mul(step.mT, A).exp_()
    if state is None:
        after.zero_()
    else:
        after.mul_(state)
    after.addcmul_((step * x).mT, keys)
    y = torch.bmm(queries, after.mT)
    if D is not None:
        y.addcmul_(x, _cast(D, dtype))
    return _cast(y, u.dtype), after


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in a dtype; asking first is cheaper than a conversion that does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


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
