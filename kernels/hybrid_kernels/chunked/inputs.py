"""Inputs of the chunked op, and the choice of algorithm, chunk size and segments.

Legend: B batch, T time, H heads, K key dim, V value dim; G heads of q and k, r value heads per G;
N sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.arguments import LinearAttention, record
from hybrid_kernels.chunked.additive import InputChunks
from hybrid_kernels.chunked.chunk_plan import ChunkPlan, chunk_plan
from hybrid_kernels.chunked.gates import RESCALE_LIMIT, RESCALE_LIMIT_PER_TOKEN
from hybrid_kernels.packing import documents

SMALLEST_CHUNK = 16

# Tokens x heads that one segment works on at a time: its matrices should stay in a core's cache.
# The backward pass of additive forms makes so many calls that fewer and longer ones pay.
SEGMENT_ROWS = 1024
SEGMENT_ROWS_TRAINING = 2048

DECAYS = ("log_decay", "value_log_decay")


class SpanSize(NamedTuple):
    """The rule for how many tokens of each sequence a segment holds.

    Attributes:
        heads: that share the segment's memory.
        rows: tokens x heads of a segment.
        unit: tokens; a segment holds a multiple.
    """

    heads: int
    rows: int
    unit: int

    def __call__(self, sequences: int) -> int:
        """Return the number of tokens for so many sequences."""
        return self.unit * max(1, self.rows // (max(1, sequences) * self.heads * self.unit))


@record
class Inputs(LinearAttention):
    """The arguments of the op, and what else its custom op takes.

    Attributes:
        exactly: decay pairs in the exact way, whatever the decays are (``gates.py``).
        keep: a backward pass follows.
    """

    exactly: bool = False
    keep: bool = False

    @property
    def span(self) -> SpanSize:
        """How many tokens of each sequence a segment holds; known before the chunk size is."""
        heads, rows = self.heads, SEGMENT_ROWS
        if self.beta is None and self.keep:
            rows = SEGMENT_ROWS_TRAINING
        elif self.beta is None:
            # Forward, half of the matrices are of queries and keys, which heads may share.
            heads = (heads + max(self.q.shape[2], self.k.shape[2])) // 2
        return SpanSize(heads, rows, max(64, self.chunk_size or 0))

    def first_chunk(self, longest: int) -> int:
        """Return the chunk size to try first, for sequences of at most ``longest`` tokens."""
        if self.chunk_size:
            return self.chunk_size
        widest = max(self.q.shape[3], self.v.shape[3])
        chunk = 32 if self.beta is not None or widest <= 32 else 64
        while chunk > SMALLEST_CHUNK and chunk // 2 >= longest:
            chunk //= 2
        return chunk

    def saved_size(self, plan: ChunkPlan | None = None) -> int:
        """Return how many numbers are saved for the backward pass."""
        (batch, time, _, keys), values = self.q.shape, self.v.shape[3]
        if not self.keep:
            return 0
        if plan is not None and plan.tokens is not None:
            chunk, chunks = plan.chunk, plan.starts[-1]
            states = sum(segment.width for segment in plan.segments)
        else:
            # Of chunks that are not halved.
            chunk = self.first_chunk(time)
            chunks, states = batch * -(-time // chunk), batch * -(-time // self.span(batch))
            # Every chunk's state, unless that is over a quarter of what q, k, v and o take.
            if self.beta is None and keys * values <= chunk * (keys + values) // 2:
                states = chunks + batch
        size = states * self.heads * keys * values
        return size if self.beta is None else size + chunks * self.heads * chunk * (values + chunk)

    def problem(self) -> InputChunks:
        """Choose the way and the chunk size; cut the inputs into chunks."""
        (batch, time), heads, q, k = self.q.shape[:2], self.heads, self.q, self.k
        log_decay, value_decay = self.log_decay, self.value_log_decay
        if log_decay is not None and log_decay.dim() == 1:
            log_decay = log_decay.expand(batch, time, heads)
        plan, exact = self._choose([g for g in (log_decay, value_decay) if g is not None])
        # A scalar decay goes with the values, which leaves queries and keys to be shared by heads;
        # but pairs of rows decay on the key side where they do so exactly.
        key_decay = log_decay
        if log_decay is not None and log_decay.dim() == 3:
            key_decay = log_decay[..., None]
            if not (exact or self.bonus is not None or value_decay is not None):
                key_decay, value_decay = None, key_decay
        groups = heads
        alone = all(x is None for x in (self.beta, self.bonus, key_decay))
        if alone and q.shape[2] == k.shape[2]:
            groups = q.shape[2]

        def cut(x: Tensor, shared: tuple[int, ...] = ()) -> Tensor:
            """Cut (B, T, any heads, ...) into chunks of G, or G x ``shared``, heads."""
            if x.shape[2] < groups:
                x = x.repeat_interleave(heads // x.shape[2], dim=2)
            return plan.chunks(x.unflatten(2, (groups, *shared))).transpose(2, 3)

        return InputChunks(
            q=cut(q),
            k=cut(k),
            v=cut(self.v, (-1,)),
            key_decay=None if key_decay is None else cut(key_decay),
            value_decay=None if value_decay is None else cut(value_decay, (-1,)),
            beta=None if self.beta is None else cut(self.beta[..., None]),
            bonus=self.bonus,
            write_scale=None
            if self.write_scale is None
            else cut(self.write_scale[..., None], (-1,)),
            scale=self.scale,
            exact=exact,
            plan=plan,
            dtype=self.dtype,
        )

    def gradient_names(self, decays_wanted: bool) -> list[str]:
        """Return the names of the gradients that the backward pass finds, in order."""
        return [name for name in self.floating() if decays_wanted or name not in DECAYS]

    def output_helps(self) -> bool:
        """Whether the backward pass is spared two products by the output, at the full precision.

        The output times its gradient is the gradient of the values' decays; where every value head
        has its own queries and only a scalar decays, they say the same.
        """
        if self.beta is not None or self.v.dtype != self.dtype:
            return False
        shared = self.q.shape[2] == self.k.shape[2] < self.v.shape[2]
        scalar = self.log_decay is not None and self.log_decay.dim() == 3
        return self.value_log_decay is not None or (shared and scalar)

    def _choose(self, decays: list[Tensor]) -> tuple[ChunkPlan, bool]:
        """Halve the chunk until rescaling is safe; if it never is, or is not wanted: exactly."""
        time, packed = self.q.shape[1], self.cu_seqlens
        found = None if packed is None else documents(packed, time)
        longest = time if found is None else max(found.lengths)
        chunk = self.first_chunk(longest)

        def plan_of(chunk: int) -> ChunkPlan:
            return chunk_plan(self.q, chunk, self.span, found)

        first = plan = plan_of(chunk)
        while decays and not _bounded([plan.chunks(g) for g in decays], longest):
            if chunk <= SMALLEST_CHUNK:
                return first, True
            chunk //= 2
            plan = plan_of(chunk)
        return plan, self.exactly


def _bounded(decays: list[Tensor], longest: int) -> bool:
    """Whether every chunk's total log decay stays above the limits; NaN counts as not.

    Of keys and values together: what is written has been divided by both.
    """
    if decays[0].numel() == 0:
        return True
    limit = max(RESCALE_LIMIT, RESCALE_LIMIT_PER_TOKEN * min(decays[0].shape[2], longest))
    # Where a decay is fixed per head (and expanded), one chunk is like the other.
    decays = [g[:1] if g.stride(0) == 0 else g for g in decays]
    lowest = torch.stack([g.sum(2, dtype=torch.float32).amin() for g in decays])
    return bool(lowest.sum() >= limit)
