"""Sizes that the chunked op chooses: chunks, spans, and what is saved for the backward pass.

Shapes: B batch, T time, H heads, K key dim, V value dim, C chunk.
"""

from __future__ import annotations

from typing import NamedTuple

from hybrid_kernels.arguments import LinearAttention
from hybrid_kernels.chunked.chunk_plan import ChunkPlan

SMALLEST_CHUNK = 16

# Tokens x heads of one span, whose matrices should stay in a core's cache. The backward pass of
# additive forms makes so many calls that fewer and longer spans are faster.
SPAN_ROWS = 1024
SPAN_ROWS_TRAINING = 2048


class SpanSize(NamedTuple):
    """The rule for how many tokens of each sequence a span holds.

    Attributes:
        heads: number of heads that share the span's memory.
        rows: tokens x heads of a span.
        unit: a span holds a multiple of so many tokens.
    """

    heads: int
    rows: int
    unit: int

    def __call__(self, sequences: int) -> int:
        """Return the number of tokens of each sequence."""
        return self.unit * max(1, self.rows // (max(1, sequences) * self.heads * self.unit))


def span_size(a: LinearAttention, training: bool) -> SpanSize:
    """Return how many tokens of each sequence a span holds; known before the chunk size is."""
    heads, rows = a.heads, SPAN_ROWS
    if not a.erases and training:
        rows = SPAN_ROWS_TRAINING
    elif not a.erases:
        # In the forward pass half of the matrices are of q and k, which heads may share.
        heads = (heads + max(a.q.shape[2], a.k.shape[2])) // 2
    return SpanSize(heads, rows, max(64, a.chunk_size or 0))


def first_chunk(a: LinearAttention, longest: int) -> int:
    """Return the chunk size to try first, for sequences of at most ``longest`` tokens."""
    if a.chunk_size:
        return a.chunk_size
    widest = max(a.q.shape[3], a.v.shape[3])
    chunk = 32 if a.erases or widest <= 32 else 64
    while chunk > SMALLEST_CHUNK and chunk // 2 >= longest:
        chunk //= 2
    return chunk


def saved_size(a: LinearAttention, plan: ChunkPlan | None = None) -> int:
    """Return how many numbers are saved for the backward pass (``saved.py``).

    Args:
        a: the arguments.
        plan: needed for packed documents only.
    """
    (batch, time, _, keys), values = a.q.shape, a.v.shape[3]
    if plan is not None and plan.tokens is not None:
        chunk, chunks = plan.chunk, plan.starts[-1]
        states = sum(span.width for span in plan.spans)
    else:
        # Of chunks that are not halved.
        chunk = first_chunk(a, time)
        chunks = batch * -(-time // chunk)
        states = batch * -(-time // span_size(a, training=True)(batch))
        # Every chunk's state, unless that is over a quarter of what q, k, v and o take.
        if not a.erases and keys * values <= chunk * (keys + values) // 2:
            states = chunks + batch
    size = states * a.heads * keys * values
    return size if not a.erases else size + chunks * a.heads * chunk * (values + chunk)
