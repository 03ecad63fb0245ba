"""Chunk outputs, parallel over chunks: o from states and pairs, and the gradient of v.

Shapes: see ``blocks.py``; R chunks in all.
"""

# pyright: reportArgumentType=false

import triton.language as tl

from hybrid_kernels.triton.blocks import (
    causal_product,
    decayed_pairs,
    kernel,
    level_product,
    load_rows,
    load_tile,
    locate,
    lower,
    place,
    product,
    scalar_factors,
    store_rows,
    straddle,
    transposed,
    vector_factors,
    widen,
)


@kernel
def outputs_forward_kernel(
    p_q,
    p_k,
    p_v,
    p_g,
    p_value_g,
    p_pairs,
    p_states,
    p_o,
    p_offsets,
    p_first,
    p_owner,
    scale,
    T,
    NT,
    H: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALAR: tl.constexpr,
    VECTOR: tl.constexpr,
    VALUE: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o = scale * ((q * read) S + pairs v), pairs_ij = q_i^T k_j decayed, i >= j.

    Grid (R * H * blocks of V,). With VECTOR, q * read and pairs (R * H, C, C) come from
    ``pairs_kernel``. With VALUE, each column of a pair has a decay of its own, and so pairs meet v
    level by level, as rows meet rows in ``pairs.py``.
    """
    i_pair, v0 = place(V, BV)
    i_chunk = i_pair // H
    i_h = i_pair % H
    i_pair = i_pair.to(tl.int64)
    row, rows = locate(i_chunk, p_offsets, p_first, p_owner, T, NT, C, PACKED)
    if rows <= 0:
        return
    b_o = tl.zeros((C, BV), dtype=tl.float32)
    b_pairs = tl.zeros((C, C), dtype=tl.float32)
    for k0 in range(0, K, BK):
        b_q = load_rows(p_q, row, rows, i_h // (H // HQ), HQ, K, k0, C, BK)
        b_state = load_tile(p_states, i_pair, K, V, k0, v0, BK, BV)
        if not VECTOR:
            b_k = load_rows(p_k, row, rows, i_h // (H // HK), HK, K, k0, C, BK)
            b_pairs += product(b_q, transposed(b_k, DOT), DOT, PRECISION)
        b_o += product(b_q, b_state, DOT, PRECISION)
    if VECTOR:
        b_pairs += load_tile(p_pairs, i_pair, C, C, 0, 0, C, C)
    elif SCALAR:
        b_sums, b_rests, b_read, _, _ = scalar_factors(p_g, row, rows, i_h, H, C)
        b_o *= b_read[:, None]
        b_pairs = decayed_pairs(b_pairs, b_sums, b_rests, C)
    else:
        b_pairs = tl.where(lower(C), b_pairs, 0.0)
    b_v = load_rows(p_v, row, rows, i_h // (H // HV), HV, V, v0, C, BV)
    if VALUE:
        b_g, b_read, _, _ = vector_factors(p_value_g, row, rows, i_h, H, V, v0, C, BV)
        m_diagonal = tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :]
        b_same = tl.sum(tl.where(m_diagonal, b_pairs, 0.0), axis=1)
        b_o = b_o * b_read + b_same[:, None] * b_v
        b_low = tl.exp(b_g)
        b_all = b_low
        b_up = tl.full((C, BV), 1.0, dtype=tl.float32)
        for level in range(0, LEVELS):
            b_across = tl.where(straddle(1 << level, C), b_pairs, 0.0)
            b_o += level_product(b_across, b_v * b_up, 1 << level, C, DOT, PRECISION) * b_low
            b_low, b_up, b_all = widen(b_low, b_up, b_all, 1 << level, C, BV)
    else:
        b_o += causal_product(b_pairs, b_v, DOT, PRECISION)
    b_o *= scale
    store_rows(p_o, b_o, row, rows, i_h, H, V, v0, C, BV)


@kernel
def values_backward_kernel(
    p_q,
    p_k,
    p_g,
    p_pairs,
    p_dstates,
    p_do,
    p_dv,
    p_offsets,
    p_first,
    p_owner,
    scale,
    T,
    NT,
    H: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALAR: tl.constexpr,
    VECTOR: tl.constexpr,
    STATES: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dv = scale * pairs^T do, and with STATES plus (k * write) dS'.

    Grid (R * H * blocks of V,). With VECTOR, k is k * write already. Without STATES it is the delta
    rule's first half: dS' is not known before du is, and ``states_backward_kernel`` adds the rest.
    """
    i_pair, v0 = place(V, BV)
    i_chunk = i_pair // H
    i_h = i_pair % H
    i_pair = i_pair.to(tl.int64)
    row, rows = locate(i_chunk, p_offsets, p_first, p_owner, T, NT, C, PACKED)
    if rows <= 0:
        return
    b_dv = tl.zeros((C, BV), dtype=tl.float32)
    b_pairs = tl.zeros((C, C), dtype=tl.float32)
    for k0 in range(0, K, BK):
        b_k = load_rows(p_k, row, rows, i_h // (H // HK), HK, K, k0, C, BK)
        if not VECTOR:
            b_q = load_rows(p_q, row, rows, i_h // (H // HQ), HQ, K, k0, C, BK)
            b_pairs += product(b_q, transposed(b_k, DOT), DOT, PRECISION)
        if STATES:
            b_dstate = load_tile(p_dstates, i_pair, K, V, k0, v0, BK, BV)
            b_dv += product(b_k, b_dstate, DOT, PRECISION)
    if VECTOR:
        b_pairs += load_tile(p_pairs, i_pair, C, C, 0, 0, C, C)
    elif SCALAR:
        b_sums, b_rests, _, b_write, _ = scalar_factors(p_g, row, rows, i_h, H, C)
        b_dv *= b_write[:, None]
        b_pairs = decayed_pairs(b_pairs, b_sums, b_rests, C)
    else:
        b_pairs = tl.where(lower(C), b_pairs, 0.0)
    b_do = load_rows(p_do, row, rows, i_h, H, V, v0, C, BV)
    b_dv += product(transposed(b_pairs * scale, DOT), b_do, DOT, PRECISION)
    store_rows(p_dv, b_dv, row, rows, i_h, H, V, v0, C, BV)
