"""Functions shared by all kernels: position of a chunk, loads and stores, decay factors.

Shapes: C rows of a chunk, K key dim, V value dim, H heads, D any row width, BD a block of it.
Names: ``b_`` a block in registers, ``p_`` a pointer or block of pointers, ``m_`` a mask.

Decay factors follow one rule: every exponent is a sum of log decays of the rows it spans, so it is
at most 0 and no digit is lost to a difference of two sums. -inf needs no special case.
"""

# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportIndexIssue=false

import triton
import triton.language as tl

# A kernel of the package. What varies with the sequence length is not specialised: else a length
# that is a multiple of 16, or leaves one chunk, would compile everything anew.
kernel = triton.jit(do_not_specialize=["T", "NT", "total_rows"])


@triton.jit
def place(D: tl.constexpr, BD: tl.constexpr):
    """Return (program, first column): programs that read the same rows stand side by side.

    They run at the same time then, and what one of them fetched the others find in the cache.
    """
    blocks: tl.constexpr = (D + BD - 1) // BD
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BD


@triton.jit
def locate(i_chunk, p_offsets, p_first, p_owner, T, NT, C: tl.constexpr, PACKED: tl.constexpr):
    """Return (first row, rows to the sequence's end) of a chunk; a surplus chunk has at most 0."""
    if PACKED:
        i_n = tl.load(p_owner + i_chunk)
        start = tl.load(p_offsets + i_n) + (i_chunk - tl.load(p_first + i_n)) * C
        stop = tl.load(p_offsets + i_n + 1)
    else:
        i_n = (i_chunk // NT).to(tl.int64)
        start = i_n * T + (i_chunk % NT) * C
        stop = i_n * T + T
    return start, (stop - start).to(tl.int32)


@triton.jit
def sequence(i_n, p_offsets, p_first, T, NT, PACKED: tl.constexpr):
    """Return (first row, end of rows, first chunk, number of chunks) of a sequence."""
    if PACKED:
        start = tl.load(p_offsets + i_n)
        stop = tl.load(p_offsets + i_n + 1)
        chunk = tl.load(p_first + i_n)
        count = tl.load(p_first + i_n + 1) - chunk
    else:
        start = i_n.to(tl.int64) * T
        stop = start + T
        chunk = i_n.to(tl.int64) * NT
        count = NT
    return start, stop, chunk, count


@triton.jit
def row_pointers(p_x, start, i_h, H, D, d0, C: tl.constexpr, BD: tl.constexpr):
    """Point at rows ``start ...`` and columns ``d0 ...`` of head ``i_h`` of a (rows, H, D) tensor."""
    o_r = tl.arange(0, C)
    o_d = d0 + tl.arange(0, BD)
    return p_x + (start * H + i_h) * D + o_r[:, None] * (H * D) + o_d[None, :]


@triton.jit
def row_mask(rows, D: tl.constexpr, d0, C: tl.constexpr, BD: tl.constexpr):
    """Mask of the entries of a (C, BD) block that lie within ``rows`` rows and D columns."""
    m_rows = tl.arange(0, C)[:, None] < rows
    if D % BD != 0:
        m_rows = m_rows & ((d0 + tl.arange(0, BD))[None, :] < D)
    return m_rows


@triton.jit
def load_rows(p_x, start, rows, i_h, H, D: tl.constexpr, d0, C: tl.constexpr, BD: tl.constexpr):
    """Load a (C, BD) block of a (rows, H, D) tensor as float32, zero where there is nothing."""
    p_rows = row_pointers(p_x, start, i_h, H, D, d0, C, BD)
    return tl.load(p_rows, mask=row_mask(rows, D, d0, C, BD), other=0.0).to(tl.float32)


@triton.jit
def store_rows(
    p_x, b_x, start, rows, i_h, H, D: tl.constexpr, d0, C: tl.constexpr, BD: tl.constexpr
):
    """Store a (C, BD) block into a (rows, H, D) tensor, in that tensor's dtype."""
    p_rows = row_pointers(p_x, start, i_h, H, D, d0, C, BD)
    tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=row_mask(rows, D, d0, C, BD))


@triton.jit
def load_column(p_x, start, rows, i_h, H, C: tl.constexpr):
    """Load C entries of a (rows, H) tensor as float32, zero where there is nothing."""
    o_r = tl.arange(0, C)
    return tl.load(p_x + (start + o_r) * H + i_h, mask=o_r < rows, other=0.0).to(tl.float32)


@triton.jit
def store_column(p_x, b_x, start, rows, i_h, H, C: tl.constexpr):
    """Store C entries into a (rows, H) tensor."""
    o_r = tl.arange(0, C)
    tl.store(p_x + (start + o_r) * H + i_h, b_x, mask=o_r < rows)


@triton.jit
def load_vector(p_x, i_row, D, d0, BD: tl.constexpr):
    """Load BD entries of row ``i_row`` of an (n, D) tensor as float32."""
    o_d = d0 + tl.arange(0, BD)
    return tl.load(p_x + i_row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit
def tile_pointers(p_x, i, K, V, k0, v0, BK: tl.constexpr, BV: tl.constexpr):
    """Point at a (BK, BV) tile of matrix ``i`` of an (n, K, V) tensor."""
    o_k = k0 + tl.arange(0, BK)
    o_v = v0 + tl.arange(0, BV)
    return p_x + i * K * V + o_k[:, None] * V + o_v[None, :]


@triton.jit
def tile_mask(K, V, k0, v0, BK: tl.constexpr, BV: tl.constexpr):
    """Mask of the entries of a (BK, BV) tile that lie within (K, V)."""
    return ((k0 + tl.arange(0, BK))[:, None] < K) & ((v0 + tl.arange(0, BV))[None, :] < V)


@triton.jit
def load_tile(p_x, i, K, V, k0, v0, BK: tl.constexpr, BV: tl.constexpr):
    """Load a (BK, BV) tile of matrix ``i`` of an (n, K, V) tensor as float32."""
    p_tile = tile_pointers(p_x, i, K, V, k0, v0, BK, BV)
    return tl.load(p_tile, mask=tile_mask(K, V, k0, v0, BK, BV), other=0.0).to(tl.float32)


@triton.jit
def store_tile(p_x, b_x, i, K, V, k0, v0, BK: tl.constexpr, BV: tl.constexpr):
    """Store a (BK, BV) tile into matrix ``i`` of an (n, K, V) tensor, in that tensor's dtype."""
    p_tile = tile_pointers(p_x, i, K, V, k0, v0, BK, BV)
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=tile_mask(K, V, k0, v0, BK, BV))


@triton.jit
def product(b_a, b_b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply two blocks with operands in ``DOT``, accumulating in float32.

    PRECISION "bf16" is for the interpreter: float32 products of operands rounded to bfloat16,
    which is what the matrix units compute.
    """
    if PRECISION == "bf16":
        b_a = b_a.to(tl.bfloat16).to(tl.float32)
        b_b = b_b.to(tl.bfloat16).to(tl.float32)
        b_product = tl.dot(b_a, b_b, input_precision="ieee")
    else:
        b_product = tl.dot(b_a.to(DOT), b_b.to(DOT), input_precision=PRECISION)
    return b_product


@triton.jit
def fine_product(b_a, b_b, DOT: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr):
    """Return ``product``, where FINE with ``b_b`` to 16 digits in two parts; ``b_a`` is as ``DOT``."""
    b_product = product(b_a, b_b, DOT, PRECISION)
    if FINE:
        b_product += product(b_a, b_b - b_b.to(tl.bfloat16).to(tl.float32), DOT, PRECISION)
    return b_product


@triton.jit
def transposed(b_x, DOT: tl.constexpr):
    """Transpose an operand of ``product``.

    What was loaded as ``DOT`` must be so again before it is turned: then it is turned by reading
    shared memory the other way, else it takes a way through registers and back.
    """
    return tl.trans(b_x.to(DOT))


@triton.jit
def lower(C: tl.constexpr):
    """Mask of the entries on and below the diagonal."""
    return tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]


@triton.jit
def strictly_lower(C: tl.constexpr):
    """Mask of the entries below the diagonal."""
    return tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]


@triton.jit
def straddle(size, C: tl.constexpr):
    """Mask of the pairs (i, j) whose split point at this level has j above it and i below.

    The split points of a level lie in the middle of every ``2 * size`` rows.
    """
    o_i = tl.arange(0, C)[:, None] // size
    o_j = tl.arange(0, C)[None, :] // size
    return (o_i % 2 == 1) & (o_j + 1 == o_i)


@triton.jit
def widen(b_low, b_up, b_all, size, C: tl.constexpr, BD: tl.constexpr):
    """Go from the decays of one level to those of the next, with blocks twice as large.

    Of each row: ``b_low``, the decay from its block's start up to it; ``b_up``, from it to its
    block's end; ``b_all``, of its whole block. At the first level a block is one row: exp(g), 1,
    exp(g). All are products of numbers of at most 1, nothing is divided.
    """
    o_r = tl.arange(0, C)[:, None]
    b_other = tl.gather(b_all, tl.broadcast_to(o_r ^ size, (C, BD)), axis=0)
    m_second = (o_r // size) % 2 == 1
    b_low = tl.where(m_second, b_low * b_other, b_low)
    b_up = tl.where(m_second, b_up, b_up * b_other)
    return b_low, b_up, b_all * b_other


@triton.jit
def scalar_factors(p_g, start, rows, i_h, H, C: tl.constexpr):
    """Return (sums, rests, decay from the chunk's start to each row, from each row to its end, of all).

    ``sums`` and ``rests`` are cumulative log decays in two parts, whose differences lose no digits:
    exp(-110) is 0 in float32, so no gate need count for more; whole multiples of 1/64 then add up
    and cancel exactly in a chunk of 64 rows, and the rests are of at most 1/128 each.
    """
    b_g = load_column(p_g, start, rows, i_h, H, C)
    # Not the maximum of the two, which would pass over a NaN.
    b_g = tl.where(b_g < -110.0, -110.0, b_g)
    b_coarse = tl.floor(b_g * 64.0 + 0.5) * (1.0 / 64.0)
    b_sums = tl.cumsum(b_coarse, axis=0)
    b_rests = tl.cumsum(b_g - b_coarse, axis=0)
    last_sum = tl.sum(b_coarse, axis=0)
    last_rest = tl.sum(b_g - b_coarse, axis=0)
    b_write = tl.exp((last_sum - b_sums) + (last_rest - b_rests))
    return b_sums, b_rests, tl.exp(b_sums + b_rests), b_write, tl.exp(last_sum + last_rest)


@triton.jit
def decayed_pairs(b_pairs, b_sums, b_rests, C: tl.constexpr):
    """Return the pairs (i, j) times exp(g_{j+1} + ... + g_i) for i >= j, 0 above the diagonal.

    Selected, not multiplied by zeros, which would keep NaN and inf of later rows.
    """
    b_between = b_sums[:, None] - b_sums[None, :] + (b_rests[:, None] - b_rests[None, :])
    b_decay = tl.exp(tl.where(lower(C), b_between, -float("inf")))
    return tl.where(lower(C), b_pairs * b_decay, 0.0)


@triton.jit
def split_finite(b_v):
    """Return rows with 0 for NaN and inf, and (C, 1) NaN from the first such row on, 0 before it."""
    b_zeros = b_v * 0.0
    b_after = tl.cumsum(tl.sum(b_zeros, axis=1), axis=0)
    return tl.where(b_zeros == 0.0, b_v, 0.0), b_after[:, None]


@triton.jit
def causal_product(b_pairs, b_v, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply lower triangular pairs by rows of which none reaches an earlier one.

    NaN or inf in a row of v makes that row and the later ones of the chunk NaN; in a plain product,
    zeros above the diagonal would carry it to the earlier ones.
    """
    b_finite, b_after = split_finite(b_v)
    return product(b_pairs, b_finite, DOT, PRECISION) + b_after


@triton.jit
def level_product(b_pairs, b_x, size, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply the pairs of one level of ``straddle`` by rows decayed up to their split points.

    Rows below a split point read rows above it, and nothing else: a decay that is NaN makes rows
    NaN that come before it, since they are decayed past it, but only later ones read those.
    """
    m_below = ((tl.arange(0, C) // size) % 2 == 1)[:, None]
    b_x = tl.where(m_below, 0.0, b_x)
    return tl.where(m_below, causal_product(b_pairs, b_x, DOT, PRECISION), 0.0)


@triton.jit
def times_gradient(b_x, b_dx):
    """Return x times its gradient, 0 where the gradient is 0 and x may be NaN."""
    return tl.where(b_dx == 0.0, 0.0, b_x * b_dx)


@triton.jit
def only_seen(b_x, b_seen):
    """Select rows of x (C, D) with ``b_seen`` (C,) other than 0; the others are 0, NaN or not.

    Of rows whose output no loss has seen, the gradients are 0, whatever NaN they are multiplied by.
    """
    return tl.where((b_seen != 0.0)[:, None], b_x, 0.0)


@triton.jit
def vector_factors(p_g, start, rows, i_h, H, K, k0, C: tl.constexpr, BK: tl.constexpr):
    """Return g and the three decays of ``scalar_factors`` for BK keys."""
    b_g = load_rows(p_g, start, rows, i_h, H, K, k0, C, BK)
    b_next = load_rows(p_g, start + 1, tl.minimum(rows, C) - 1, i_h, H, K, k0, C, BK)
    b_read = tl.exp(tl.cumsum(b_g, axis=0))
    b_write = tl.exp(tl.cumsum(b_next, axis=0, reverse=True))
    return b_g, b_read, b_write, tl.exp(tl.sum(b_g, axis=0))
