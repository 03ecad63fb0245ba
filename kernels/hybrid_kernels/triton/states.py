"""State passing: the only kernels that walk over time, one chunk a step.

Forward leaves the state before every chunk, backward the gradient of the state after every chunk;
all else is parallel over chunks. The delta rule's new values ``u = U - W S`` need the state, and
so are made here.

Legend: see ``blocks.py``; N sequences, R chunks in all.
"""

# pyright: reportArgumentType=false

import triton.language as tl

from hybrid_kernels.triton.blocks import (
    kernel,
    load_rows,
    load_tile,
    load_vector,
    place,
    product,
    scalar_factors,
    sequence,
    store_rows,
    store_tile,
    transposed,
    vector_factors,
)


@kernel
def states_forward_kernel(
    p_k,
    p_v,
    p_g,
    p_value_g,
    p_w,
    p_u,
    p_initial,
    p_states,
    p_final,
    p_offsets,
    p_first,
    T,
    NT,
    H: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALAR: tl.constexpr,
    VECTOR: tl.constexpr,
    VALUE: tl.constexpr,
    DELTA: tl.constexpr,
    INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S' = total * S + k^T (v * write); with DELTA, v is replaced by u = U - W S, in place of U.

    Grid (N * H * blocks of K * blocks of V,); DELTA needs all of K in one block.
    Reads k (rows, HK, K), v (rows, HV, V) or w, u (rows, H, K or V); writes states (R, H, K, V).
    With VECTOR, k is k * write already, and g the decay of whole chunks (R, H, K). With VALUE,
    value_g (rows, H, V) decays columns: v as k is, S by its own total.
    """
    i_tile, v0 = place(V, BV)
    blocks_k: tl.constexpr = (K + BK - 1) // BK
    k0 = i_tile % blocks_k * BK
    i_n = i_tile // blocks_k // H
    i_h = i_tile // blocks_k % H
    i_state = (i_tile // blocks_k).to(tl.int64)
    start, stop, chunk, count = sequence(i_n, p_offsets, p_first, T, NT, PACKED)
    b_state = tl.zeros((BK, BV), dtype=tl.float32)
    if INITIAL:
        b_state += load_tile(p_initial, i_state, K, V, k0, v0, BK, BV)
    for i in range(0, count):
        row = start + i * C
        rows = (stop - row).to(tl.int32)
        store_tile(p_states, b_state, (chunk + i) * H + i_h, K, V, k0, v0, BK, BV)
        b_k = load_rows(p_k, row, rows, i_h // (H // HK), HK, K, k0, C, BK)
        if DELTA:
            b_w = load_rows(p_w, row, rows, i_h, H, K, k0, C, BK)
            b_v = load_rows(p_u, row, rows, i_h, H, V, v0, C, BV)
            b_v -= product(b_w, b_state, DOT, PRECISION)
            store_rows(p_u, b_v, row, rows, i_h, H, V, v0, C, BV)
        else:
            b_v = load_rows(p_v, row, rows, i_h // (H // HV), HV, V, v0, C, BV)
        if SCALAR:
            _, _, _, b_write, total = scalar_factors(p_g, row, rows, i_h, H, C)
            b_v *= b_write[:, None]
            b_state *= total
        if VECTOR:
            b_state *= load_vector(p_g, (chunk + i) * H + i_h, K, k0, BK)[:, None]
        if VALUE:
            _, _, b_up, b_total = vector_factors(p_value_g, row, rows, i_h, H, V, v0, C, BV)
            b_v *= b_up
            b_state *= b_total[None, :]
        b_state += product(transposed(b_k, DOT), b_v, DOT, PRECISION)
    store_tile(p_final, b_state, i_state, K, V, k0, v0, BK, BV)


@kernel
def states_backward_kernel(
    p_q,
    p_k,
    p_g,
    p_value_g,
    p_w,
    p_do,
    p_du,
    p_dfinal,
    p_dstates,
    p_dinitial,
    p_offsets,
    p_first,
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
    VALUE: tl.constexpr,
    DELTA: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS = total * dS' + scale * q^T (do * read); with DELTA, minus W^T du.

    Grid as in the forward pass; with VECTOR, q and k are decayed already and g is as there. With
    DELTA, du (rows, H, V) holds what the chunk's own outputs give and receives (k * write) dS' on
    top. Writes dstates (R, H, K, V), the dS' of each chunk.
    """
    i_tile, v0 = place(V, BV)
    blocks_k: tl.constexpr = (K + BK - 1) // BK
    k0 = i_tile % blocks_k * BK
    i_n = i_tile // blocks_k // H
    i_h = i_tile // blocks_k % H
    i_state = (i_tile // blocks_k).to(tl.int64)
    start, stop, chunk, count = sequence(i_n, p_offsets, p_first, T, NT, PACKED)
    b_dstate = load_tile(p_dfinal, i_state, K, V, k0, v0, BK, BV)
    for step in range(0, count):
        i = count - 1 - step
        row = start + i * C
        rows = (stop - row).to(tl.int32)
        store_tile(p_dstates, b_dstate, (chunk + i) * H + i_h, K, V, k0, v0, BK, BV)
        b_q = load_rows(p_q, row, rows, i_h // (H // HQ), HQ, K, k0, C, BK)
        b_do = load_rows(p_do, row, rows, i_h, H, V, v0, C, BV) * scale
        b_carried = b_dstate
        if DELTA:
            b_k = load_rows(p_k, row, rows, i_h // (H // HK), HK, K, k0, C, BK)
        if SCALAR:
            _, _, b_read, b_write, total = scalar_factors(p_g, row, rows, i_h, H, C)
            b_do *= b_read[:, None]
            b_carried *= total
            if DELTA:
                b_k *= b_write[:, None]
        if VECTOR:
            b_carried *= load_vector(p_g, (chunk + i) * H + i_h, K, k0, BK)[:, None]
        if VALUE:
            _, b_low, _, b_total = vector_factors(p_value_g, row, rows, i_h, H, V, v0, C, BV)
            b_do *= b_low
            b_carried *= b_total[None, :]
        if DELTA:
            b_du = load_rows(p_du, row, rows, i_h, H, V, v0, C, BV)
            b_du += product(b_k, b_dstate, DOT, PRECISION)
            store_rows(p_du, b_du, row, rows, i_h, H, V, v0, C, BV)
            b_w = load_rows(p_w, row, rows, i_h, H, K, k0, C, BK)
            b_carried -= product(transposed(b_w, DOT), b_du, DOT, PRECISION)
        b_dstate = b_carried + product(transposed(b_q, DOT), b_do, DOT, PRECISION)
    store_tile(p_dinitial, b_dstate, i_state, K, V, k0, v0, BK, BV)
