"""Forward in one walk over time: states never leave the registers, outputs are made on the way.

``states_forward`` and ``outputs_forward`` write and read every chunk's state, which at K = V = 128
and 64 rows is as much as q, k, v and o together; here that traffic is gone, and with it the second
read of k and v. The price is that only heads and columns are parallel, so this is for calls with
enough of them (``launch.walks``). Decays over values do without.

Shapes: see ``blocks.py``; N sequences, R chunks in all.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false

import triton.language as tl

from hybrid_kernels.triton.blocks import (
    causal_product,
    decayed_pairs,
    fine_product,
    kernel,
    load_rows,
    load_tile,
    load_vector,
    lower,
    place,
    product,
    scalar_factors,
    sequence,
    store_rows,
    store_tile,
    transposed,
)
from hybrid_kernels.triton.delta import new_values


@kernel
def fused_chunk_forward_kernel(
    p_q,
    p_k,
    p_v,
    p_g,
    p_total,
    p_erase,
    p_beta,
    p_inverse,
    p_pairs,
    p_initial,
    p_o,
    p_final,
    p_offsets,
    p_first,
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
    VECTOR: tl.constexpr,
    DELTA: tl.constexpr,
    FINE: tl.constexpr,
    PARTS: tl.constexpr,
    INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o = scale * ((q * read) S + pairs v), then S' = total * S + k^T (v * write).

    Grid (N * H * blocks of V,); all of K in one block. With DELTA, v is replaced as in
    ``states_forward_kernel``. With DELTA or VECTOR, pairs (R * H, C, C) are made already: few
    registers are left for them here. With VECTOR, so are q, which is q * read, k, which is
    k * write, erase, which is k * read, and total (R, H, K).
    """
    i_state, v0 = place(V, BV)
    i_n = i_state // H
    i_h = i_state % H
    i_state = i_state.to(tl.int64)
    start, stop, chunk, count = sequence(i_n, p_offsets, p_first, T, NT, PACKED)
    b_state = tl.zeros((BK, BV), dtype=tl.float32)
    if INITIAL:
        b_state += load_tile(p_initial, i_state, K, V, 0, v0, BK, BV)
    for i in range(0, count):
        row = start + i * C
        rows = (stop - row).to(tl.int32)
        i_pair = (chunk + i) * H + i_h
        b_q = load_rows(p_q, row, rows, i_h // (H // HQ), HQ, K, 0, C, BK)
        b_k = load_rows(p_k, row, rows, i_h // (H // HK), HK, K, 0, C, BK)
        b_v = load_rows(p_v, row, rows, i_h // (H // HV), HV, V, v0, C, BV)
        b_read = 1.0
        if SCALAR:
            b_sums, b_rests, b_read, b_write, total = scalar_factors(p_g, row, rows, i_h, H, C)
        if VECTOR or DELTA:
            b_pairs = load_tile(p_pairs, i_pair, C, C, 0, 0, C, C)
        else:
            b_pairs = product(b_q, transposed(b_k, DOT), DOT, PRECISION)
            if SCALAR:
                b_pairs = decayed_pairs(b_pairs, b_sums, b_rests, C)
            else:
                b_pairs = tl.where(lower(C), b_pairs, 0.0)
        # Before the other products, so that it is in half as many registers by then.
        b_pairs = b_pairs.to(DOT)
        if DELTA:
            b_v = new_values(
                *(p_erase, p_beta, p_inverse, b_k, b_v, b_read, b_state, row, rows, i_h, i_pair),
                *(H, K, C, BK, VECTOR, PARTS, DOT, PRECISION, FINE),
            )
        b_o = product(b_q, b_state, DOT, PRECISION)
        if SCALAR:
            b_o *= b_read[:, None]
        b_o += causal_product(b_pairs, b_v, DOT, PRECISION)
        store_rows(p_o, b_o * scale, row, rows, i_h, H, V, v0, C, BV)
        if SCALAR:
            b_state *= total
            b_v *= b_write[:, None]
        if VECTOR:
            b_state *= load_vector(p_total, i_pair, K, 0, BK)[:, None]
        b_state += fine_product(transposed(b_k, DOT), b_v, DOT, PRECISION, FINE)
    store_tile(p_final, b_state, i_state, K, V, 0, v0, BK, BV)
