"""The delta rule inside a chunk: the unit-triangular inverse and what is multiplied by it.

With L_ij = beta_i k_i^T k_j decayed, i > j, the new values of a chunk solve
(I + L) u = beta v - beta (k * read) S (arXiv 2406.06484, section 3.2, with decay), so that
u = U - W S with U = X beta v, W = X beta (k * read), X = (I + L)^-1.

X is built in float32 by forward substitution inside blocks of 16 rows, all of them at once, then by
merging neighbours. Never by a power series: with near-equal keys and beta = 1 the powers of L grow
like binomial coefficients and take every digit with them.

Legend: see ``blocks.py``; R chunks in all.
"""

# pyright: reportArgumentType=false

import triton
import triton.language as tl

from hybrid_kernels.triton.blocks import (
    kernel,
    load_column,
    load_rows,
    load_tile,
    locate,
    product,
    scalar_factors,
    store_column,
    store_rows,
    straddle,
    transposed,
    vector_factors,
)


@triton.jit
def unit_inverse(b_strict, C: tl.constexpr, PRECISION: tl.constexpr):
    """Return (I + L)^-1 for strictly lower L (C, C), float32; C is 16 times a power of two."""
    o_b = tl.arange(0, C // 16)
    o_r = tl.arange(0, 16)
    m_block = o_b[:, None, None, None] == o_b[None, None, :, None]
    b_cut = tl.reshape(b_strict, (C // 16, 16, C // 16, 16))
    b_diagonal = tl.sum(tl.where(m_block, b_cut, 0.0), axis=2)
    m_identity = (o_r[:, None] == o_r[None, :])[None, :, :]
    b_small = tl.where(m_identity & (o_b[:, None, None] >= 0), 1.0, 0.0)
    for i in range(1, 16):
        m_row = (o_r == i)[None, :, None]
        b_row = tl.sum(tl.where(m_row, b_diagonal, 0.0), axis=1)
        b_solved = tl.sum(b_row[:, :, None] * b_small, axis=1)
        b_small = tl.where(m_row, b_small - b_solved[:, None, :], b_small)
    b_x = tl.reshape(tl.where(m_block, b_small[:, :, None, :], 0.0), (C, C))
    size = 16
    while size < C:
        b_below = tl.where(straddle(size, C), b_strict, 0.0)
        b_left = product(b_x, b_below, tl.float32, PRECISION)
        b_x -= product(b_left, b_x, tl.float32, PRECISION)
        size *= 2
    return b_x


@kernel
def new_values_kernel(
    p_k,
    p_v,
    p_g,
    p_beta,
    p_inverse,
    p_w,
    p_u,
    p_offsets,
    p_first,
    p_owner,
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
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W = X beta (k * read) into w (rows, H, K), U = X beta v into u (rows, H, V).

    Grid (R * H,).
    """
    i_chunk = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_pair = tl.program_id(0).to(tl.int64)
    row, rows = locate(i_chunk, p_offsets, p_first, p_owner, T, NT, C, PACKED)
    if rows <= 0:
        return
    b_beta = load_column(p_beta, row, rows, i_h, H, C)
    b_inverse = load_tile(p_inverse, i_pair, C, C, 0, 0, C, C) * b_beta[None, :]
    for v0 in range(0, V, BV):
        b_v = load_rows(p_v, row, rows, i_h // (H // HV), HV, V, v0, C, BV)
        b_u = product(b_inverse, b_v, DOT, PRECISION)
        store_rows(p_u, b_u, row, rows, i_h, H, V, v0, C, BV)
    if SCALAR:
        _, _, b_decay, _, _ = scalar_factors(p_g, row, rows, i_h, H, C)
        b_inverse *= b_decay[None, :]
    for k0 in range(0, K, BK):
        b_k = load_rows(p_k, row, rows, i_h // (H // HK), HK, K, k0, C, BK)
        if VECTOR:
            _, b_read, _, _ = vector_factors(p_g, row, rows, i_h, H, K, k0, C, BK)
            b_k *= b_read
        b_w = product(b_inverse, b_k, DOT, PRECISION)
        store_rows(p_w, b_w, row, rows, i_h, H, K, k0, C, BK)


@kernel
def new_values_backward_kernel(
    p_v,
    p_beta,
    p_inverse,
    p_du,
    p_dx,
    p_dv,
    p_dbeta,
    p_offsets,
    p_first,
    p_owner,
    T,
    NT,
    H: tl.constexpr,
    HV: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = X^T du, the gradient of the right-hand side; dv = beta dx; dbeta = dx . v so far.

    Grid (R * H,). What beta and k gain through ``beta (k * read) S`` and through L has the form of
    an additive output read with k whose gradient is -beta dx; ``keys_backward_kernel`` adds it.
    """
    i_chunk = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_pair = tl.program_id(0).to(tl.int64)
    row, rows = locate(i_chunk, p_offsets, p_first, p_owner, T, NT, C, PACKED)
    if rows <= 0:
        return
    b_beta = load_column(p_beta, row, rows, i_h, H, C)
    b_inverse = transposed(load_tile(p_inverse, i_pair, C, C, 0, 0, C, C), DOT)
    b_dbeta = tl.zeros((C,), dtype=tl.float32)
    for v0 in range(0, V, BV):
        b_du = load_rows(p_du, row, rows, i_h, H, V, v0, C, BV)
        b_v = load_rows(p_v, row, rows, i_h // (H // HV), HV, V, v0, C, BV)
        b_dx = product(b_inverse, b_du, DOT, PRECISION)
        b_dbeta += tl.sum(b_dx * b_v, axis=1)
        store_rows(p_dx, b_dx, row, rows, i_h, H, V, v0, C, BV)
        store_rows(p_dv, b_dx * b_beta[:, None], row, rows, i_h, H, V, v0, C, BV)
    store_column(p_dbeta, b_dbeta, row, rows, i_h, H, C)
