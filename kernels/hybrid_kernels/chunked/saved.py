"""Tensors saved for the backward pass, in one block of memory.

Of the additive form, the states before each chunk: found again, they would cost a product and a
walk. Of the delta rule, what was written (u) and the inverse, from which the states follow without
the walk's two products a chunk; the states themselves would take more memory and spare less. Where
the states of all chunks are too large (``Inputs.saved_size``), do not fit because chunks were halved,
or end one by one because documents are packed, those before each segment are saved.

Legend: as in ``additive.py``.
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
        memory: (n,), enough for the states before each segment and the delta rule's rows.

    Attributes:
        every_chunk: the states before each chunk are saved, not only those before each segment.
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
        self._places, rows = {}, 0
        for segment in plan.segments:
            self._places[segment.lead.start] = rows
            rows += segment.width * heads
        rows = all_states if self.every_chunk else rows
        self._states = memory[: rows * size].view(rows, *shape)
        if self.every_chunk:
            each = plan.sequences * heads
            self._steps = self._states.split_with_sizes([each] * (len(plan.widths) + 1))
        if delta:
            chunk, rest = plan.chunk, memory[rows * size :]
            written, rest = rest.split([n := chunks * chunk * shape[1], rest.numel() - n])
            self._written = written.view(chunks, chunk, shape[1])
            self._inverse = rest[: chunks * chunk * chunk].view(chunks, chunk, chunk)

    def before(self, segment: ChunkSpan) -> Tensor:
        """Return the states before a segment, (width G, K, r V)."""
        first = self._places[segment.lead.start]
        return self._states[first : first + segment.width * self.heads]

    def states(self, segment: ChunkSpan) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the states around the steps of a segment, together and those between two steps."""
        rows, lead = self._rows(segment), segment.lead
        together = self._states[rows.start : rows.stop + segment.width * self.heads]
        return together, self._steps[lead.start : lead.stop + 1]

    def delta(self, segment: ChunkSpan) -> tuple[Tensor, Tensor]:
        """Return what a segment's rows write (b, C, V) and its inverses (b, C, C)."""
        rows = self._rows(segment)
        return self._written[rows], self._inverse[rows]

    def _rows(self, segment: ChunkSpan) -> slice:
        lead, each = segment.lead, self.plan.batch * self.heads
        return slice(lead.start * each, lead.stop * each)
