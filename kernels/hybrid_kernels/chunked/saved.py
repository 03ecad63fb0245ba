"""Tensors saved for the backward pass, in one block of memory.

The additive form saves the states before each chunk: computing them again would take a product and
a walk. The delta rule saves what was written (u) and the inverse, from which the states follow
without the walk's two products a chunk; the states themselves would take more memory and save less.
Where the states of all chunks are too large (``sizes.saved_size``), do not fit because chunks were
halved, or end one by one because documents are packed, those before each span are saved.

Shapes: b chunks x G of one span, G heads of q and k, C chunk, K key dim, r V value dims per G.
"""

from __future__ import annotations

from torch import Tensor

from hybrid_kernels.chunked.chunk_plan import ChunkPlan, ChunkSpan


class Saved:
    """Views of that memory.

    Args:
        plan: of the chunks.
        heads: G.
        shape: (K, r V) of a state.
        delta: which form.
        memory: (n,), enough for the states before each span and the delta rule's rows.

    Attributes:
        every_chunk: the states before each chunk are saved, not only those before each span.
    """

    def __init__(
        self,
        plan: ChunkPlan,
        heads: int,
        shape: tuple[int, int],
        delta: bool,
        memory: Tensor,
    ):
        self.plan, self.heads = plan, heads
        chunks, size = plan.starts[-1] * heads, shape[0] * shape[1]
        all_states = chunks + plan.sequences * heads
        self.every_chunk = not delta and plan.tokens is None and memory.numel() >= all_states * size
        self._first, rows = {}, 0
        for span in plan.spans:
            self._first[span.lead.start] = rows
            rows += span.width * heads
        rows = all_states if self.every_chunk else rows
        self._states = memory[: rows * size].view(rows, *shape)
        if delta:
            chunk, rest = plan.chunk, memory[rows * size :]
            written, rest = rest.split([n := chunks * chunk * shape[1], rest.numel() - n])
            self._written = written.view(chunks, chunk, shape[1])
            self._inverse = rest[: chunks * chunk * chunk].view(chunks, chunk, chunk)

    def before(self, span: ChunkSpan) -> Tensor:
        """Return the states before a span, (width G, K, r V)."""
        first = self._first[span.lead.start]
        return self._states[first : first + span.width * self.heads]

    def states(self, span: ChunkSpan) -> Tensor:
        """Return the states before the chunks of a span and after its last ones."""
        rows = self._rows(span)
        return self._states[rows.start : rows.stop + span.width * self.heads]

    def delta(self, span: ChunkSpan) -> tuple[Tensor, Tensor]:
        """Return what a span's rows write (b, C, V) and its inverses (b, C, C)."""
        rows = self._rows(span)
        return self._written[rows], self._inverse[rows]

    def _rows(self, span: ChunkSpan) -> slice:
        # Packed documents count chunks along the leading axis, batches count steps.
        each = self.plan.batch * self.heads
        return slice(span.lead.start * each, span.lead.stop * each)
