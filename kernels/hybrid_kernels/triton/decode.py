"""One token of every form: the decode step, in one kernel that keeps its state in registers.

Shapes: see ``blocks.py``.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.arguments import LinearAttention
from hybrid_kernels.triton.blocks import kernel, load_tile, load_vector, place, store_tile
from hybrid_kernels.triton.launch import block, config, launch


@kernel
def decode_kernel(
    p_q,
    p_k,
    p_v,
    p_g,
    p_value_g,
    p_beta,
    p_bonus,
    p_initial,
    p_o,
    p_final,
    scale,
    g_stride,
    H: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALAR: tl.constexpr,
    VECTOR: tl.constexpr,
    VALUE: tl.constexpr,
    DELTA: tl.constexpr,
    BONUS: tl.constexpr,
    INITIAL: tl.constexpr,
):
    """One step of the recurrence as ``linear_attention`` states it.

    Grid (B * H * blocks of V,); all of K in one block. q, k, v (B, heads, K or V), states
    (B, H, K, V) float32.
    """
    i_row, v0 = place(V, BV)
    i_row = i_row.to(tl.int64)
    i_b = i_row // H
    i_h = i_row % H
    b_q = load_vector(p_q, i_b * HQ + i_h // (H // HQ), K, 0, BK) * scale
    b_k = load_vector(p_k, i_b * HK + i_h // (H // HK), K, 0, BK)
    b_v = load_vector(p_v, i_b * HV + i_h // (H // HV), V, v0, BV)
    b_state = tl.zeros((BK, BV), dtype=tl.float32)
    if INITIAL:
        b_state += load_tile(p_initial, i_row, K, V, 0, v0, BK, BV)
    b_read = b_state
    if SCALAR:
        b_state *= tl.exp(tl.load(p_g + i_b * g_stride + i_h).to(tl.float32))
    if VECTOR:
        b_state *= tl.exp(load_vector(p_g, i_row, K, 0, BK))[:, None]
    if VALUE:
        b_state *= tl.exp(load_vector(p_value_g, i_row, V, v0, BV))[None, :]
    if DELTA:
        b_v -= tl.sum(b_k[:, None] * b_state, axis=0)
        b_v *= tl.load(p_beta + i_row).to(tl.float32)
    b_state += b_k[:, None] * b_v[None, :]
    if BONUS:
        b_bonus = load_vector(p_bonus, i_h, K, 0, BK)
        b_read += (b_bonus * b_k)[:, None] * b_v[None, :]
    else:
        b_read = b_state
    b_o = tl.sum(b_q[:, None] * b_read, axis=0)
    o_v = v0 + tl.arange(0, BV)
    tl.store(p_o + i_row * V + o_v, b_o.to(p_o.dtype.element_ty), mask=o_v < V)
    store_tile(p_final, b_state, i_row, K, V, 0, v0, BK, BV)


def step(a: LinearAttention) -> tuple[Tensor, Tensor]:
    """Return o (B, 1, H, V) and the next state (B, H, K, V) for T = 1; no gradient."""
    q, k, v, heads = a.q, a.k, a.v, a.heads
    o, final = _empty(a)
    found = config("decode", q.device, tl.float32)
    values = block(v.shape[3], found.values)
    optional = (a.log_decay, a.value_log_decay, a.beta, a.bonus, a.initial_state)
    filled = [q if x is None else x.contiguous() for x in optional]
    dims = 0 if a.log_decay is None else a.log_decay.dim()
    launch(
        decode_kernel,
        (q.shape[0] * heads * triton.cdiv(v.shape[3], values),),
        found,
        *(q.contiguous(), k.contiguous(), v.contiguous(), *filled, o, final),
        *(a.scale, 0 if dims == 1 else heads),
        H=heads,
        HQ=q.shape[2],
        HK=k.shape[2],
        HV=v.shape[2],
        K=q.shape[3],
        V=v.shape[3],
        BK=block(q.shape[3], 256),
        BV=values,
        SCALAR=dims in (1, 3),
        VECTOR=dims == 4,
        VALUE=a.value_log_decay is not None,
        DELTA=a.beta is not None,
        BONUS=a.bonus is not None,
        INITIAL=a.initial_state is not None,
    )
    return o, final


def _empty(a: LinearAttention) -> tuple[Tensor, Tensor]:
    shape = (a.q.shape[0], a.heads, a.q.shape[3], a.v.shape[3])
    o = a.v.new_empty(a.q.shape[0], 1, a.heads, a.v.shape[3])
    return o, a.q.new_empty(shape, dtype=torch.float32)


_decode = torch.library.custom_op(
    "hybrid_kernels::triton_linear_attention_decode",
    lambda *values: step(LinearAttention(*values)),
    mutates_args=(),
    schema=f"({LinearAttention.SCHEMA}) -> (Tensor, Tensor)",
)


@_decode.register_fake
def _(*values):
    return _empty(LinearAttention(*values))


def decode(a: LinearAttention) -> tuple[Tensor, Tensor]:
    """Return the output and the next state of one token."""
    return _decode(*[getattr(a, name) for name in a.NAMES])
