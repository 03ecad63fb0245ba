"""How a batch of sequences becomes a list of chunks, and back.

Chunks are ordered by step: first the first chunk of every sequence, then the second of every one
that has a second, and so on. Packed documents are sorted by their number of chunks, longest first,
so that the sequences still running at a step are always a prefix of the states. A plain batch is
the case in which all of them run to the end.

Shapes: B batch, T time, N documents (B for a plain batch), C chunk, R chunks in all, G heads of q
and k, r value heads per G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hybrid_kernels.packing import Documents


@dataclass(frozen=True)
class ChunkSpan:
    """A run of consecutive steps that is computed together.

    Attributes:
        lead: slice of the leading axis of ``ChunkPlan.chunks``.
        offsets: first chunk of each step, counted from the span's own first, and their total.
        widths: number of sequences that run at each step.
    """

    lead: slice
    offsets: list[int]
    widths: list[int]

    @property
    def width(self) -> int:
        """Number of sequences that run at the span's first step."""
        return self.widths[0]

    def sizes(self, heads: int) -> tuple[int, ...]:
        """Return the number of chunks at each step, ``heads`` to a sequence."""
        return tuple([width * heads for width in self.widths])

    def states(self, heads: int) -> int:
        """Return how many states lie before and after the steps, ``heads`` to a sequence."""
        rows = self.offsets[-1]
        return (rows + self.width if self.dense else 2 * rows) * heads

    @property
    def dense(self) -> bool:
        """Whether all sequences outlast the span: the states after a step are then the next's."""
        return self.widths[0] == self.widths[-1]

    def before_and_after(self, states: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Split memory for ``states`` into states before and after each step, which may overlap."""
        rows = self.offsets[-1] * heads
        return states[:rows], states[self.width * heads if self.dense else rows :]


class ChunkPlan:
    """The chunks of one batch or of one row of packed documents.

    Args:
        batch: B.
        time: T.
        chunk: C.
        span_size: from a number of sequences to how many tokens of each a span holds, a multiple
            of C.
        lengths: of the packed documents, or None.
        device: of the tensors.
    """

    def __init__(
        self,
        batch: int,
        time: int,
        chunk: int,
        span_size: Callable[[int], int],
        lengths: list[int] | None,
        device: torch.device,
    ):
        self.batch, self.time, self.chunk, self.span_size = batch, time, chunk, span_size
        # For packed documents: the place of each token, and the document of each state.
        self.tokens: Tensor | None = None
        self.order: Tensor | None = None
        if lengths is None:
            self.sequences = batch
            self.widths = [batch] * -(-time // chunk)
        else:
            self._pack(lengths, device)
        self.starts = [0]
        for width in self.widths:
            self.starts.append(self.starts[-1] + width)

    def _pack(self, lengths: list[int], device: torch.device) -> None:
        """Sort the documents and find the place of every token among the chunks."""
        self.sequences = len(lengths)
        counts = [-(-length // self.chunk) for length in lengths]
        order = sorted(range(len(lengths)), key=lambda row: -counts[row])
        self.widths = []
        running = len(lengths)
        for step in range(max(counts)):
            while counts[order[running - 1]] <= step:
                running -= 1
            self.widths.append(running)
        self.order = torch.tensor(order, device=device)
        length = torch.tensor(lengths, device=device)
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(lengths), device=device)
        first = (length.cumsum(0) - length).repeat_interleave(length)
        within = torch.arange(self.time, device=device) - first
        width = torch.tensor([0, *self.widths], device=device).cumsum(0)
        row = width[within // self.chunk] + place.repeat_interleave(length)
        self.tokens = row * self.chunk + within % self.chunk
        # The way back: the token at every place, and the places that hold none.
        places = sum(self.widths) * self.chunk
        self.source = torch.zeros(places, dtype=torch.int64, device=device)
        self.source[self.tokens] = torch.arange(self.time, device=device)
        empty = torch.ones(places, dtype=torch.bool, device=device)
        empty[self.tokens] = False
        self.padding = empty.nonzero().flatten()

    @cached_property
    def spans(self) -> list[ChunkSpan]:
        """The steps cut into spans; empty without sequences."""
        found, step = [], 0
        while step < len(self.widths) and self.widths[step]:
            steps = self.span_size(self.widths[step]) // self.chunk
            stop = min(step + steps, len(self.widths))
            offsets = [s - self.starts[step] for s in self.starts[step : stop + 1]]
            lead = slice(step, stop)
            if self.tokens is not None:
                lead = slice(self.starts[step], self.starts[stop])
            found.append(ChunkSpan(lead, offsets, self.widths[step:stop]))
            step = stop
        return found

    def chunks(self, x: Tensor) -> Tensor:
        """View (B, T, ...) as (leading, sequences at a step, C, ...); copies only to pad."""
        if self.tokens is not None:
            padded = x[0].index_select(0, self.source).index_fill_(0, self.padding, 0)
            return padded.unflatten(0, (-1, 1, self.chunk))
        missing = len(self.widths) * self.chunk - self.time
        if missing:
            x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
        shape = (self.batch, len(self.widths), self.chunk, *x.shape[2:])
        return x.reshape(shape).transpose(0, 1)

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return memory for a (B, T, *shape) result, and the view of it by chunks to fill."""
        if self.tokens is not None:
            whole = torch.empty(self.starts[-1] * self.chunk, *shape, dtype=dtype, device=device)
            return whole, whole.unflatten(0, (-1, 1, self.chunk))
        steps = len(self.widths)
        whole = torch.empty(self.batch, steps * self.chunk, *shape, dtype=dtype, device=device)
        view = whole.view(self.batch, steps, self.chunk, *shape).transpose(0, 1)
        return whole, view

    def result(self, whole: Tensor) -> Tensor:
        """Cut the memory of ``empty`` back to (B, T, ...).

        Never a view: autograd refuses in-place writes to views among the outputs of a custom op.
        """
        if self.tokens is not None:
            return whole[None].index_select(1, self.tokens)
        return whole if whole.shape[1] == self.time else whole.narrow_copy(1, 0, self.time)

    def sort_states(self, states: Tensor) -> Tensor:
        """Bring one state per sequence into the order of the chunks (a copy)."""
        return states.clone() if self.order is None else states[self.order]

    def unsort_states(self, states: Tensor) -> Tensor:
        """Undo ``sort_states``."""
        if self.order is None:
            return states
        return torch.empty_like(states).index_copy_(0, self.order, states)


def chunk_plan(
    x: Tensor, chunk: int, span_size: Callable[[int], int], packed: Documents | None
) -> ChunkPlan:
    """Return the plan for an input (B, T, ...); of packed documents, one for all calls alike.

    Args:
        x: any input of the op.
        chunk: C.
        span_size: as ``ChunkPlan`` takes it; compared by value.
        packed: the documents, or None for a plain batch.
    """
    batch, time = x.shape[:2]
    if packed is None:
        return ChunkPlan(batch, time, chunk, span_size, None, x.device)
    return packed.plan(
        (chunk, span_size, x.device),
        lambda: ChunkPlan(batch, time, chunk, span_size, packed.lengths, x.device),
    )
