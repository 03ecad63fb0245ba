"""Decayed products of the pairs of rows of a chunk, for a decay over keys and the delta rule.

A decay over keys has no one factor per pair. The strictly lower triangle is cut recursively: the
lower left quarter, the lower left quarters of its two diagonal halves, and so on down to single
entries. All pairs of one level straddle a split point of it, so each level is one matrix product
of rows decayed from there and rows decayed up to there, masked to its own blocks.

Shapes: see ``blocks.py``; R chunks in all.
"""

# pyright: reportArgumentType=false

import triton
import triton.language as tl

from hybrid_kernels.triton.blocks import (
    decayed_pairs,
    kernel,
    load_column,
    load_rows,
    locate,
    lower,
    only_seen,
    product,
    scalar_factors,
    store_column,
    store_rows,
    store_tile,
    straddle,
    strictly_lower,
    transposed,
    vector_factors,
    widen,
)
from hybrid_kernels.triton.delta import store_inverse, unit_inverse


@kernel
def pairs_kernel(
    p_q,
    p_k,
    p_g,
    p_beta,
    p_pairs,
    p_inverse,
    p_read,
    p_write,
    p_erase,
    p_total,
    p_offsets,
    p_first,
    p_owner,
    T,
    NT,
    H: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    SCALAR: tl.constexpr,
    VECTOR: tl.constexpr,
    DELTA: tl.constexpr,
    INVERSE: tl.constexpr,
    PAIRS: tl.constexpr,
    SEEN: tl.constexpr,
    EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """pairs_ij = q_i^T k_j decayed, i >= j (PAIRS), and the inverse of I + beta_i k_i^T k_j (INVERSE).

    Grid (R * H,). Writes pairs (R * H, C, C) and the inverse as ``store_inverse`` does. With VECTOR,
    which implies PAIRS, also q * read, k * write and with DELTA k * read (rows, H, K), and the decay
    of the whole chunk (R, H, K), float32: what the walk over time needs of g, so that it reads no
    gates. With SEEN, which implies VECTOR, q is the gradient of an output: its rows of zeros have no
    pairs, NaN or not. EXACT is the precision of products that must keep float32's digits.
    """
    i_chunk = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_pair = tl.program_id(0).to(tl.int64)
    row, rows = locate(i_chunk, p_offsets, p_first, p_owner, T, NT, C, PACKED)
    b_pairs = tl.zeros((C, C), dtype=tl.float32)
    b_strict = tl.zeros((C, C), dtype=tl.float32)
    b_diagonal = tl.zeros((C,), dtype=tl.float32)
    b_seen = tl.zeros((C,), dtype=tl.float32)
    for k0 in range(0, K, BK):
        b_k = load_rows(p_k, row, rows, i_h // (H // HK), HK, K, k0, C, BK)
        if VECTOR:
            b_q = load_rows(p_q, row, rows, i_h // (H // HQ), HQ, K, k0, C, BK)
            b_diagonal += tl.sum(b_q * b_k, axis=1)
            if SEEN:
                b_seen += tl.sum(tl.abs(b_q), axis=1)
            b_g, b_read, b_write, b_total = vector_factors(p_g, row, rows, i_h, H, K, k0, C, BK)
            store_rows(p_read, b_q * b_read, row, rows, i_h, H, K, k0, C, BK)
            store_rows(p_write, b_k * b_write, row, rows, i_h, H, K, k0, C, BK)
            if DELTA:
                store_rows(p_erase, b_k * b_read, row, rows, i_h, H, K, k0, C, BK)
            o_k = k0 + tl.arange(0, BK)
            tl.store(p_total + i_pair * K + o_k, b_total, mask=o_k < K)
            b_all = tl.exp(b_g)
            b_low = b_all
            b_up = tl.full((C, BK), 1.0, dtype=tl.float32)
            for level in range(0, LEVELS):
                m_level = straddle(1 << level, C)
                b_above = transposed(b_k * b_up, DOT)
                b_pairs += tl.where(m_level, product(b_q * b_low, b_above, DOT, PRECISION), 0.0)
                if INVERSE:
                    b_strict += tl.where(
                        m_level, product(b_k * b_low, b_above, DOT, PRECISION), 0.0
                    )
                b_low, b_up, b_all = widen(b_low, b_up, b_all, 1 << level, C, BK)
        else:
            if PAIRS:
                b_q = load_rows(p_q, row, rows, i_h // (H // HQ), HQ, K, k0, C, BK)
                b_pairs += product(b_q, transposed(b_k, DOT), DOT, PRECISION)
            b_strict += product(b_k, transposed(b_k, DOT), DOT, PRECISION)
    if VECTOR:
        m_diagonal = tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :]
        b_pairs = tl.where(m_diagonal, b_diagonal[:, None], b_pairs)
        if SEEN:
            b_pairs = only_seen(b_pairs, b_seen)
    elif SCALAR:
        b_sums, b_rests, _, _, _ = scalar_factors(p_g, row, rows, i_h, H, C)
        b_pairs = decayed_pairs(b_pairs, b_sums, b_rests, C)
        b_strict = decayed_pairs(b_strict, b_sums, b_rests, C)
    else:
        b_pairs = tl.where(lower(C), b_pairs, 0.0)
    if PAIRS:
        store_tile(p_pairs, b_pairs, i_pair, C, C, 0, 0, C, C)
    if INVERSE:
        b_beta = load_column(p_beta, row, rows, i_h, H, C)
        b_strict = tl.where(strictly_lower(C), b_strict * b_beta[:, None], 0.0)
        b_inverse = unit_inverse(b_strict, C, EXACT)
        store_inverse(p_inverse, b_inverse, i_pair, C, PARTS)


@triton.jit
def spanning_pairs(b_pairs, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Sum for each t the pairs (i, j) with j < t <= i of a strictly lower matrix."""
    b_ones = tl.where(strictly_lower(C), 1.0, 0.0)
    b_before = product(b_pairs, transposed(b_ones, DOT), DOT, PRECISION)
    return tl.sum(tl.where(lower(C), b_before, 0.0), axis=0)


@kernel
def pairs_backward_kernel(
    p_q,
    p_k,
    p_g,
    p_beta,
    p_do,
    p_u,
    p_v,
    p_dx,
    p_dpairs,
    p_dstrict,
    p_dg,
    p_dbeta,
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
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALAR: tl.constexpr,
    DELTA: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dpairs_ij = scale * do_i^T u_j, i >= j; with DELTA dstrict_ij = dx_i^T u_j, i > j; else u is v.

    Grid (R * H,). Gradients of the decayed products, zero elsewhere, (R * H, C, C) each. With
    SCALAR they are decayed, so of the products themselves, and dg (rows, H) is what the decay gains
    of the pairs of rows that it stands between. With DELTA, dbeta (rows, H) is dx . v so far: what
    it gains by the second read, ``keys_backward_kernel`` adds.
    """
    i_chunk = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_pair = tl.program_id(0).to(tl.int64)
    row, rows = locate(i_chunk, p_offsets, p_first, p_owner, T, NT, C, PACKED)
    if rows <= 0:
        return
    b_dpairs = tl.zeros((C, C), dtype=tl.float32)
    b_dstrict = tl.zeros((C, C), dtype=tl.float32)
    b_dbeta = tl.zeros((C,), dtype=tl.float32)
    b_seen = tl.zeros((C,), dtype=tl.float32)
    b_seen_dx = tl.zeros((C,), dtype=tl.float32)
    for v0 in range(0, V, BV):
        b_do = load_rows(p_do, row, rows, i_h, H, V, v0, C, BV)
        if DELTA:
            b_u = transposed(load_rows(p_u, row, rows, i_h, H, V, v0, C, BV), DOT)
            b_dx = load_rows(p_dx, row, rows, i_h, H, V, v0, C, BV)
            b_dstrict += product(b_dx, b_u, DOT, PRECISION)
            b_seen_dx += tl.sum(tl.abs(b_dx), axis=1)
            b_v = load_rows(p_v, row, rows, i_h // (H // HV), HV, V, v0, C, BV)
            b_dbeta += tl.sum(b_dx * b_v, axis=1)
        else:
            b_u = transposed(load_rows(p_u, row, rows, i_h // (H // HV), HV, V, v0, C, BV), DOT)
        b_dpairs += product(b_do, b_u, DOT, PRECISION)
        b_seen += tl.sum(tl.abs(b_do), axis=1)
    b_dpairs = only_seen(b_dpairs, b_seen)
    if DELTA:
        b_dstrict = only_seen(b_dstrict, b_seen_dx)
    if SCALAR:
        b_sums, b_rests, _, _, _ = scalar_factors(p_g, row, rows, i_h, H, C)
        b_dpairs = decayed_pairs(b_dpairs * scale, b_sums, b_rests, C)
        b_dstrict = decayed_pairs(b_dstrict, b_sums, b_rests, C)
    else:
        b_dpairs = tl.where(lower(C), b_dpairs, 0.0) * scale
    store_tile(p_dpairs, b_dpairs, i_pair, C, C, 0, 0, C, C)
    if DELTA:
        store_column(p_dbeta, b_dbeta, row, rows, i_h, H, C)
        b_dstrict = tl.where(strictly_lower(C), b_dstrict, 0.0)
        store_tile(p_dstrict, b_dstrict, i_pair, C, C, 0, 0, C, C)
    if SCALAR:
        b_pairs = tl.zeros((C, C), dtype=tl.float32)
        b_strict = tl.zeros((C, C), dtype=tl.float32)
        for k0 in range(0, K, BK):
            b_q = load_rows(p_q, row, rows, i_h // (H // HQ), HQ, K, k0, C, BK)
            b_k = load_rows(p_k, row, rows, i_h // (H // HK), HK, K, k0, C, BK)
            b_pairs += product(b_q, transposed(b_k, DOT), DOT, PRECISION)
            if DELTA:
                b_strict += product(b_k, transposed(b_k, DOT), DOT, PRECISION)
        b_spans = tl.where(strictly_lower(C), only_seen(b_pairs * b_dpairs, b_seen), 0.0)
        if DELTA:
            b_beta = load_column(p_beta, row, rows, i_h, H, C)
            b_spans -= only_seen(b_strict * b_dstrict * b_beta[:, None], b_seen_dx)
        store_column(p_dg, spanning_pairs(b_spans, C, DOT, PRECISION), row, rows, i_h, H, C)
