"""The delta rule inside a chunk: the unit-triangular inverse and what is multiplied by it.

With L_ij = beta_i k_i^T k_j decayed, i > j, the new values of a chunk solve (I + L) u = r,
r = beta (v - (k * read) S) (arXiv 2406.06484, section 3.2, with decay), so that u = X r with
X = (I + L)^-1. What is kept is X - I: u = r + (X - I) r has the rounding of r as an operand in its
second term only.

X is built in float32 by forward substitution inside blocks of 16 rows, all of them at once, then by
merging neighbours. Never by a power series: with near-equal keys and beta = 1 the powers of L grow
like binomial coefficients and take every digit with them.

Shapes: see ``blocks.py``; R chunks in all.
"""

# pyright: reportArgumentType=false

import triton
import triton.language as tl

from hybrid_kernels.triton.blocks import (
    causal_product,
    fine_product,
    load_column,
    load_rows,
    load_tile,
    product,
    split_finite,
    store_tile,
    straddle,
    transposed,
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
        b_left = causal_product(b_x, b_below, tl.float32, PRECISION)
        b_x -= causal_product(b_left, b_x, tl.float32, PRECISION)
        size *= 2
    return b_x


@triton.jit
def store_inverse(p_inverse, b_inverse, i_pair, C: tl.constexpr, PARTS: tl.constexpr):
    """Store X - I, in one or two parts, into (R * H, PARTS, C, C)."""
    m_diagonal = tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :]
    b_rest = tl.where(m_diagonal, 0.0, b_inverse)
    store_tile(p_inverse, b_rest, i_pair * PARTS, C, C, 0, 0, C, C)
    if PARTS == 2:
        b_rest -= b_rest.to(tl.bfloat16).to(tl.float32)
        store_tile(p_inverse, b_rest, i_pair * PARTS + 1, C, C, 0, 0, C, C)


@triton.jit
def solve(
    p_inverse,
    b_r,
    i_pair,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    FINE: tl.constexpr,
):
    """Return X r, with TRANSPOSED X^T r, of what ``store_inverse`` kept.

    X r reaches no row before one of r that is not finite.
    """
    b_x = load_tile(p_inverse, i_pair * PARTS, C, C, 0, 0, C, C)
    b_solved = b_r
    if TRANSPOSED:
        b_x = transposed(b_x, DOT)
    else:
        b_r, b_after = split_finite(b_r)
        b_solved += b_after
    b_solved += fine_product(b_x, b_r, DOT, PRECISION, FINE)
    if PARTS == 2:
        b_x = load_tile(p_inverse, i_pair * PARTS + 1, C, C, 0, 0, C, C)
        if TRANSPOSED:
            b_x = transposed(b_x, DOT)
        b_solved += product(b_x, b_r, DOT, PRECISION)
    return b_solved


@triton.jit
def new_values(
    p_erase,
    p_beta,
    p_inverse,
    b_k,
    b_v,
    b_read,
    b_state,
    row,
    rows,
    i_h,
    i_pair,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    VECTOR: tl.constexpr,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    FINE: tl.constexpr,
):
    """Return u = X beta (v - (k * read) S) of a chunk, all of K in one block.

    With VECTOR, k * read is loaded; ``b_read`` is a decay per row, or 1.
    """
    if VECTOR:
        b_k = load_rows(p_erase, row, rows, i_h, H, K, 0, C, BK)
    b_beta = load_column(p_beta, row, rows, i_h, H, C)
    b_r = b_v * b_beta[:, None]
    b_r -= fine_product(b_k, b_state, DOT, PRECISION, FINE) * (b_beta * b_read)[:, None]
    return solve(p_inverse, b_r, i_pair, C, PARTS, False, DOT, PRECISION, FINE)
