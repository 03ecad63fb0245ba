"""Gradients of queries, keys, decay and beta, parallel over chunks and blocks of K.

The delta rule reads the state twice: with q for the output, and with k for what is already stored.
Both reads have the same gradient, so the second one is the first with k for q and -beta dx for do.

No gradient of a decay is a difference of sums: each pair of rows counts once, for the steps that
it spans. Where gates differ by many orders of magnitude a difference would keep only rounding.

Shapes: see ``blocks.py``; R chunks in all.
"""

# pyright: reportArgumentType=false

import triton
import triton.language as tl

from hybrid_kernels.triton.blocks import (
    causal_product,
    kernel,
    level_product,
    load_column,
    load_rows,
    load_tile,
    load_vector,
    locate,
    lower,
    only_seen,
    place,
    product,
    scalar_factors,
    store_column,
    store_rows,
    straddle,
    strictly_lower,
    times_gradient,
    transposed,
    vector_factors,
    widen,
)


@triton.jit
def sum_rows(b_x, m_rows, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Sum for each t the rows s with ``m_rows[t, s]``; as a product, for speed."""
    return product(tl.where(m_rows, 1.0, 0.0).to(DOT), b_x, DOT, PRECISION)


@triton.jit
def spanned(size, C: tl.constexpr):
    """Mask of (t, s): row s reads or writes across step t, at the level with blocks of ``size``.

    Rows above a split point write across the steps after them, rows below it read across those up
    to their own.
    """
    o_t = tl.arange(0, C)[:, None]
    o_s = tl.arange(0, C)[None, :]
    m_below = (o_t // size) % 2 == 1
    return (o_t // size == o_s // size) & (m_below == (o_s >= o_t))


@kernel
def keys_backward_kernel(
    p_q,
    p_k,
    p_v,
    p_g,
    p_beta,
    p_states,
    p_dstates,
    p_do,
    p_dx,
    p_dpairs,
    p_dstrict,
    p_total,
    p_dq,
    p_dk,
    p_dg,
    p_dbeta,
    p_offsets,
    p_first,
    p_owner,
    scale,
    T,
    NT,
    total_rows,
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
    DELTA: tl.constexpr,
    TOTAL: tl.constexpr,
    SWAPPED: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write dq, dk (rows, H, K), dg and, with DELTA, dbeta and the second read's share of dk.

    Grid (R * H * blocks of K,). dg is (rows, H, K) with VECTOR; with SCALAR it is, as dbeta is,
    (blocks of K, rows, H), to be summed with what the pairs of rows give. That, dpairs and dstrict
    come from ``pairs_backward_kernel``.
    With DELTA, v is u. With a decay over values, v is v * write and do is do * read, dpairs are
    decayed too, and TOTAL says that total (R, H, V) holds that decay for whole chunks.

    The loss treats (q, k, g) and (do, v, value_g) alike, so that this kernel also gives dv and the
    gradient of value_g when they change places: K is V then, and SWAPPED says that states are not
    turned with them.
    """
    i_pair, k0 = place(K, BK)
    i_chunk = i_pair // H
    i_h = i_pair % H
    i_pair = i_pair.to(tl.int64)
    part = (k0 // BK).to(tl.int64) * total_rows * H
    row, rows = locate(i_chunk, p_offsets, p_first, p_owner, T, NT, C, PACKED)
    if rows <= 0:
        return
    b_dq = tl.zeros((C, BK), dtype=tl.float32)
    b_dk = tl.zeros((C, BK), dtype=tl.float32)
    b_dr = tl.zeros((C, BK), dtype=tl.float32)
    b_dtotal = tl.zeros((BK,), dtype=tl.float32)
    b_seen = tl.zeros((C,), dtype=tl.float32)
    b_seen_dx = tl.zeros((C,), dtype=tl.float32)
    for v0 in range(0, V, BV):
        b_do = load_rows(p_do, row, rows, i_h, H, V, v0, C, BV)
        b_v = load_rows(p_v, row, rows, i_h // (H // HV), HV, V, v0, C, BV)
        if SWAPPED:
            b_state = transposed(load_tile(p_states, i_pair, V, K, v0, k0, BV, BK), DOT)
            b_dstate = transposed(load_tile(p_dstates, i_pair, V, K, v0, k0, BV, BK), DOT)
        else:
            b_state = load_tile(p_states, i_pair, K, V, k0, v0, BK, BV)
            b_dstate = load_tile(p_dstates, i_pair, K, V, k0, v0, BK, BV)
        b_dq += product(b_do, transposed(b_state, DOT), DOT, PRECISION)
        b_dk += product(b_v, transposed(b_dstate, DOT), DOT, PRECISION)
        b_seen += tl.sum(tl.abs(b_do), axis=1)
        if TOTAL:
            b_state *= load_vector(p_total, i_pair, V, v0, BV)[None, :]
        b_dtotal += tl.sum(b_state * b_dstate, axis=1)
        if DELTA:
            b_dx = load_rows(p_dx, row, rows, i_h, H, V, v0, C, BV)
            b_dr += product(b_dx, transposed(b_state, DOT), DOT, PRECISION)
            b_seen_dx += tl.sum(tl.abs(b_dx), axis=1)
    if SWAPPED:
        # do stands in the place of q.
        b_seen = tl.zeros((C,), dtype=tl.float32)
        for d0 in range(0, K, BK):
            b_x = load_rows(p_q, row, rows, i_h // (H // HQ), HQ, K, d0, C, BK)
            b_seen += tl.sum(tl.abs(b_x), axis=1)
    b_dq = only_seen(b_dq, b_seen)
    if DELTA:
        b_dr = only_seen(b_dr, b_seen_dx)
    # As wide as the operands of products: half the registers in bfloat16, and nothing lost.
    b_q = load_rows(p_q, row, rows, i_h // (H // HQ), HQ, K, k0, C, BK).to(DOT)
    b_k = load_rows(p_k, row, rows, i_h // (H // HK), HK, K, k0, C, BK).to(DOT)
    b_dq *= scale
    if DELTA:
        # The second read is by k, and -beta weighs its rows; dr is without, so that beta may be 0.
        b_weight = -load_column(p_beta, row, rows, i_h, H, C)[:, None]
    if SCALAR:
        _, _, b_read, b_write, total = scalar_factors(p_g, row, rows, i_h, H, C)
        b_dq *= b_read[:, None]
        b_dk *= b_write[:, None]
        b_reads = tl.sum(times_gradient(b_q, b_dq), axis=1)
        b_writes = tl.sum(times_gradient(b_k, b_dk), axis=1)
        if DELTA:
            b_dr *= b_read[:, None]
            b_reads += tl.sum(times_gradient(b_weight * b_k, b_dr), axis=1)
        b_dg = tl.cumsum(b_reads, axis=0, reverse=True)
        b_dg += tl.sum(tl.where(strictly_lower(C), b_writes[None, :], 0.0), axis=1)
        b_dg += tl.sum(b_dtotal, axis=0) * total
        store_column(p_dg + part, b_dg, row, rows, i_h, H, C)
    if VECTOR:
        b_g, b_read, b_write, b_total = vector_factors(p_g, row, rows, i_h, H, K, k0, C, BK)
        b_dq *= b_read
        b_dk *= b_write
        b_reads = times_gradient(b_q, b_dq)
        if DELTA:
            b_dr *= b_read
            b_reads += times_gradient(b_weight * b_k, b_dr)
        b_dg = sum_rows(b_reads, tl.trans(lower(C)), DOT, PRECISION)
        b_earlier = tl.where(strictly_lower(C), 1.0, 0.0)
        b_dg += causal_product(b_earlier, times_gradient(b_k, b_dk), DOT, PRECISION)
        b_dg += (b_dtotal * b_total)[None, :]
        b_low = tl.exp(b_g)
        b_all = b_low
        b_up = tl.full((C, BK), 1.0, dtype=tl.float32)
        o_r = tl.arange(0, C)
        b_same = tl.load(p_dpairs + i_pair * C * C + o_r * (C + 1)).to(tl.float32)
        if SWAPPED:
            b_same = tl.where(b_seen != 0.0, b_same, 0.0)
        b_dq += times_gradient(b_k, b_same[:, None])
        b_dk += times_gradient(b_q, b_same[:, None])
        o_pair = i_pair * C * C + o_r[:, None] * C + o_r[None, :]
        for level in range(0, LEVELS):
            m_level = straddle(1 << level, C)
            b_d = tl.load(p_dpairs + o_pair, mask=m_level, other=0.0)
            if SWAPPED:
                b_d = only_seen(b_d, b_seen)
            elif TOTAL:
                # p_do is decayed: it may be 0 where do is not, and pairs are not.
                b_seen = tl.sum(tl.abs(b_d.to(tl.float32)), axis=1)
            b_dread = level_product(b_d, b_k * b_up, 1 << level, C, DOT, PRECISION) * b_low
            b_dread = only_seen(b_dread, b_seen)
            b_dwrite = product(transposed(b_d, DOT), b_q * b_low, DOT, PRECISION)
            b_dq += b_dread
            b_reads = times_gradient(b_q, b_dread)
            if DELTA:
                b_d = tl.load(p_dstrict + o_pair, mask=m_level, other=0.0)
                b_dread = level_product(b_d, b_k * b_up, 1 << level, C, DOT, PRECISION) * b_low
                b_dread = only_seen(b_dread, b_seen_dx)
                b_dwrite += product(transposed(b_d * b_weight, DOT), b_k * b_low, DOT, PRECISION)
                b_dr += b_dread
                b_reads += times_gradient(b_weight * b_k, b_dread)
            b_dwrite *= b_up
            b_dk += b_dwrite
            m_span = spanned(1 << level, C)
            b_reads += times_gradient(b_k, b_dwrite)
            b_dg += sum_rows(b_reads, m_span, DOT, PRECISION)
            b_low, b_up, b_all = widen(b_low, b_up, b_all, 1 << level, C, BK)
        store_rows(p_dg, b_dg, row, rows, i_h, H, K, k0, C, BK)
    else:
        b_d = load_tile(p_dpairs, i_pair, C, C, 0, 0, C, C)
        if TOTAL:
            b_seen = tl.sum(tl.abs(b_d), axis=1)
        b_dq += only_seen(causal_product(b_d, b_k, DOT, PRECISION), b_seen)
        b_dk += product(transposed(b_d, DOT), b_q, DOT, PRECISION)
        if DELTA:
            b_d = load_tile(p_dstrict, i_pair, C, C, 0, 0, C, C)
            b_dr += only_seen(causal_product(b_d, b_k, DOT, PRECISION), b_seen_dx)
            b_dk += product(transposed(b_d * b_weight, DOT), b_k, DOT, PRECISION)
    if DELTA:
        store_column(
            p_dbeta + part, -tl.sum(times_gradient(b_k, b_dr), axis=1), row, rows, i_h, H, C
        )
        b_dk += b_weight * b_dr
    store_rows(p_dq, b_dq, row, rows, i_h, H, K, k0, C, BK)
    store_rows(p_dk, b_dk, row, rows, i_h, H, K, k0, C, BK)
