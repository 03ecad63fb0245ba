"""State passing: the only kernels that walk over time, one chunk a step.

Forward leaves the state before every chunk, backward the gradient of the state after every chunk;
all else is parallel over chunks. The delta rule's new values need the state, and so are made here;
there FINE says that what is carried on, and what goes into it, keeps 16 digits in products: with no
decay nothing forgets their rounding.

Shapes: see ``blocks.py``; N sequences, R chunks in all.
"""

# pyright: reportArgumentType=false

import triton.language as tl

from hybrid_kernels.triton.blocks import (
    fine_product,
    kernel,
    load_column,
    load_rows,
    load_tile,
    load_vector,
    place,
    scalar_factors,
    sequence,
    store_rows,
    store_tile,
    transposed,
    vector_factors,
)
from hybrid_kernels.triton.delta import new_values, solve


@kernel
def states_forward_kernel(
    p_k,
    p_v,
    p_g,
    p_value_g,
    p_erase,
    p_beta,
    p_inverse,
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
    FINE: tl.constexpr,
    PARTS: tl.constexpr,
    INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S' = total * S + k^T (v * write); with DELTA u = X beta (v - (k * read) S) for v.

    Grid (N * H * blocks of K * blocks of V,); DELTA needs all of K in one block.
    Reads k (rows, HK, K), v (rows, HV, V); writes states (R, H, K, V), with DELTA u (rows, H, V).
    With VECTOR, k is k * write already, and g the decay of whole chunks (R, H, K); with DELTA too,
    erase is k * read (rows, H, K). With VALUE, value_g (rows, H, V) decays columns: v as k is, S by
    its own total.
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
        i_pair = (chunk + i) * H + i_h
        store_tile(p_states, b_state, i_pair, K, V, k0, v0, BK, BV)
        b_k = load_rows(p_k, row, rows, i_h // (H // HK), HK, K, k0, C, BK)
        b_v = load_rows(p_v, row, rows, i_h // (H // HV), HV, V, v0, C, BV)
        b_read = 1.0
        if SCALAR:
            _, _, b_read, b_write, total = scalar_factors(p_g, row, rows, i_h, H, C)
        if DELTA:
            b_v = new_values(
                *(p_erase, p_beta, p_inverse, b_k, b_v, b_read, b_state, row, rows, i_h, i_pair),
                *(H, K, C, BK, VECTOR, PARTS, DOT, PRECISION, FINE),
            )
            store_rows(p_u, b_v, row, rows, i_h, H, V, v0, C, BV)
        if SCALAR:
            b_v *= b_write[:, None]
            b_state *= total
        if VECTOR:
            b_state *= load_vector(p_g, i_pair, K, k0, BK)[:, None]
        if VALUE:
            _, _, b_up, b_total = vector_factors(p_value_g, row, rows, i_h, H, V, v0, C, BV)
            b_v *= b_up
            b_state *= b_total[None, :]
        b_state += fine_product(transposed(b_k, DOT), b_v, DOT, PRECISION, FINE)
    store_tile(p_final, b_state, i_state, K, V, k0, v0, BK, BV)


@kernel
def states_backward_kernel(
    p_q,
    p_k,
    p_g,
    p_value_g,
    p_erase,
    p_beta,
    p_inverse,
    p_do,
    p_dx,
    p_dv,
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
    FINE: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS = total * dS' + scale * q^T (do * read); with DELTA, minus (k * read)^T beta dx.

    Grid as in the forward pass; with VECTOR, q, k and erase are decayed already and g is as there.
    With DELTA, dx (rows, H, V) holds what the chunk's own outputs give u, and receives the gradient
    of beta (v - (k * read) S): X^T du, du with (k * write) dS' on top. Writes dstates (R, H, K, V),
    the dS' of each chunk, and with DELTA dv = beta dx (rows, H, V).
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
        i_pair = (chunk + i) * H + i_h
        store_tile(p_dstates, b_dstate, i_pair, K, V, k0, v0, BK, BV)
        b_q = load_rows(p_q, row, rows, i_h // (H // HQ), HQ, K, k0, C, BK)
        b_do = load_rows(p_do, row, rows, i_h, H, V, v0, C, BV) * scale
        b_carried = b_dstate
        if DELTA:
            b_k = load_rows(p_k, row, rows, i_h // (H // HK), HK, K, k0, C, BK)
        if SCALAR:
            _, _, b_read, b_write, total = scalar_factors(p_g, row, rows, i_h, H, C)
            b_do *= b_read[:, None]
            b_carried *= total
        if VECTOR:
            b_carried *= load_vector(p_g, i_pair, K, k0, BK)[:, None]
        if VALUE:
            _, b_low, _, b_total = vector_factors(p_value_g, row, rows, i_h, H, V, v0, C, BV)
            b_do *= b_low
            b_carried *= b_total[None, :]
        if DELTA:
            b_dx = fine_product(b_k, b_dstate, DOT, PRECISION, FINE)
            if SCALAR:
                b_dx *= b_write[:, None]
            b_dx += load_rows(p_dx, row, rows, i_h, H, V, v0, C, BV)
            b_dx = solve(p_inverse, b_dx, i_pair, C, PARTS, True, DOT, PRECISION, FINE)
            store_rows(p_dx, b_dx, row, rows, i_h, H, V, v0, C, BV)
            b_dx *= load_column(p_beta, row, rows, i_h, H, C)[:, None]
            store_rows(p_dv, b_dx, row, rows, i_h, H, V, v0, C, BV)
            if SCALAR:
                b_dx *= b_read[:, None]
            if VECTOR:
                b_k = load_rows(p_erase, row, rows, i_h, H, K, k0, C, BK)
            b_carried -= fine_product(transposed(b_k, DOT), b_dx, DOT, PRECISION, FINE)
        b_dstate = b_carried + fine_product(transposed(b_q, DOT), b_do, DOT, PRECISION, FINE)
    store_tile(p_dinitial, b_dstate, i_state, K, V, k0, v0, BK, BV)
