"""Chunked linear attention (stage one: additive, no / fixed / scalar decay, plain autograd)."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.packing import document_lengths
from hybrid_kernels.validation import state_dtype

# exp(-104) is 0 in float32; the clamp keeps -inf out of sums.
CLOSED = {torch.float32: -104.0, torch.float64: -750.0}


def unsupported(op, **a):
    if op != "linear_attention":
        return None
    for name in ("beta", "bonus", "value_log_decay"):
        if a[name] is not None:
            return f"{name} is not implemented yet"
    if a["log_decay"] is not None and a["log_decay"].dim() == 4:
        return "vector decay is not implemented yet"
    return None


def linear_attention(
    q, k, v, *, log_decay, value_log_decay, beta, bonus, scale, initial_state, cu_seqlens, chunk_size
):
    B, T, _, K = q.shape
    H = max(q.shape[2], k.shape[2], v.shape[2])
    V = v.shape[3]
    dt = state_dtype(q, k, v)
    out_dtype = v.dtype
    q, k, v = (x.to(dt).repeat_interleave(H // x.shape[2], 2) for x in (q, k, v))
    g = log_decay
    if g is None:
        g = q.new_zeros(H)
    g = g.to(dt).clamp(min=CLOSED[dt])
    g = g.expand(B, T, H)
    tokens = None
    if cu_seqlens is not None:
        lengths = document_lengths(cu_seqlens, T)
        N, L = len(lengths), max(lengths)
        ln = torch.tensor(lengths, device=q.device)
        start = torch.arange(N, device=q.device) * L - (ln.cumsum(0) - ln)
        tokens = torch.arange(T, device=q.device) + start.repeat_interleave(ln)
        pad = lambda x: x.new_zeros(N * L, *x.shape[2:]).index_copy(0, tokens, x[0]).view(N, L, *x.shape[2:])
        q, k, v, g = pad(q), pad(k), pad(v), pad(g)
        B, T = N, L
    C = chunk_size or 64
    C = min(C, max(16, 1 << max(T - 1, 0).bit_length()))
    n = -(-T // C)

    def chunks(x):
        x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, n * C - T))
        return x.view(B, n, C, *x.shape[2:]).transpose(2, 3)

    q, k, v = chunks(q * scale), chunks(k), chunks(v)
    g = chunks(g[..., None])[..., 0]  # B n H C
    G = g.cumsum(-1)
    mask = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    seg = (g[..., None] * mask.tril(-1)).cumsum(-2)
    D = seg.exp() * mask
    o = ((q @ k.mT) * D) @ v
    rest = (g.flip(-1).cumsum(-1).flip(-1) - g) if False else seg[..., -1, :]
    Z = (k * rest.exp()[..., None]).mT @ v
    S = initial_state.to(dt) if initial_state is not None else q.new_zeros(B, H, K, V)
    d = G[..., -1].exp()[..., None, None]
    states = []
    for i in range(n):
        states.append(S)
        S = S * d[:, i] + Z[:, i]
    if n:
        o = o + (q * G.exp()[..., None]) @ torch.stack(states, 1)
    o = o.transpose(2, 3).reshape(B, n * C, H, V)[:, :T]
    if tokens is not None:
        o = o.reshape(B * T, H, V)[tokens][None]
    return o.to(out_dtype), S
