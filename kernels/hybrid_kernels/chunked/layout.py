"""How a batch of sequences becomes a list of chunks, and back.

Chunks are ordered by step: first the first chunk of every sequence, then the second of every one
that has a second, and so on. Packed documents are sorted by their number of chunks, longest first,
so that the sequences still running at a step are always a prefix of the states. A plain batch is
the case in which all of them run to the end.

Legend: B batch, T time, N documents (B for a plain batch), C chunk, R chunks in all, G heads of q
and k, r value heads per G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of consecutive steps that is computed together.

    Attributes:
        lead: slice of the leading axis of ``Layout.chunks``.
        offsets: first chunk of each step, counted from the segment's own first, and their total.
        widths: number of sequences that run at each step.
        following: number of sequences that run at the step after the last.
    """

    lead: slice
    offsets: list[int]
    widths: list[int]
    following: int

    @property
    def width(self) -> int:
        """Number of sequences that run at the segment's first step."""
        return self.widths[0]


class Layout:
    """The chunks of one batch or of one row of packed documents.

    Args:
        batch: B.
        time: T.
        chunk: C.
        span: from a number of sequences to how many tokens of each a segment holds, a multiple of C.
        lengths: of the packed documents, or None.
        device: of the tensors.
    """

    def __init__(
        self,
        batch: int,
        time: int,
        chunk: int,
        span: Callable[[int], int],
        lengths: list[int] | None,
        device: torch.device,
    ):
        self.batch, self.time, self.chunk, self.span = batch, time, chunk, span
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

    def segments(self) -> list[Segment]:
        """Cut the steps into segments."""
        found, step = [], 0
        while step < len(self.widths):
            span = self.span(self.widths[step])
            stop = min(step + span // self.chunk, len(self.widths))
            offsets = [s - self.starts[step] for s in self.starts[step : stop + 1]]
            lead = slice(step, stop)
            if self.tokens is not None:
                lead = slice(self.starts[step], self.starts[stop])
            following = self.widths[stop] if stop < len(self.widths) else 0
            found.append(Segment(lead, offsets, self.widths[step:stop], following))
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
        """Cut the memory of ``empty`` back to (B, T, ...)."""
        if self.tokens is not None:
            return whole.index_select(0, self.tokens)[None]
        return whole[:, : self.time].contiguous()

    def sort_states(self, states: Tensor) -> Tensor:
        """Bring one state per sequence into the order of the chunks (a copy)."""
        return states.clone() if self.order is None else states[self.order]

    def unsort_states(self, states: Tensor) -> Tensor:
        """Undo ``sort_states``."""
        if self.order is None:
            return states
        return torch.empty_like(states).index_copy_(0, self.order, states)


def load(
    chunks: Tensor,
    dtype: torch.dtype,
    factor: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gather chunks of G heads into (R*G, C, ...), times ``factor``, in ``dtype``.

    Args:
        chunks: (leading, sequences, C, G, ...).
        dtype: of the result.
        factor: something that broadcasts to the result, with its leading axis or one-dimensional.
        out: where to put the result; without it and without a factor, the result may be a view.
    """
    x = chunks.transpose(2, 3)
    shape = (x.shape[0] * x.shape[1] * x.shape[2], *x.shape[3:])
    if out is None:
        if factor is None:
            return x.to(dtype).reshape(shape)
        out = torch.empty(shape, dtype=dtype, device=x.device)
    target = out.unflatten(0, x.shape[:3])
    if factor is None:
        target.copy_(x)
    else:
        torch.mul(x, _by_chunk(factor, x), out=target)
    return out


def store(chunks: Tensor, x: Tensor, factor: Tensor | None = None) -> None:
    """Scatter (R*G, C, ...), times ``factor``, into chunks of G heads."""
    target = chunks.transpose(2, 3)
    x = x.unflatten(0, target.shape[:3])
    if factor is None:
        target.copy_(x)
    else:
        torch.mul(x, _by_chunk(factor, target), out=target)


def _by_chunk(factor: Tensor, chunks: Tensor) -> Tensor:
    return factor if factor.dim() == 1 else factor.unflatten(0, chunks.shape[:3])


def split(x: Tensor, segment: Segment, heads: int) -> tuple[Tensor, ...]:
    """Cut (R*G, ...) into the steps of a segment."""
    return x.split([width * heads for width in segment.widths])


def walk(pieces: tuple[Tensor, ...], state: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk states forward through the steps of a segment.

    Args:
        pieces: memory for the states before each step; the first is filled in.
        state: of all sequences; filled in for those that end in the segment or outlast it.

    Yields:
        the index of a step, the states before it, and where to put those after it.
    """
    for i, start in enumerate(pieces):
        width = start.shape[0]
        running = pieces[i + 1].shape[0] if i + 1 < len(pieces) else 0
        if running == width:
            yield i, start, pieces[i + 1]
        elif running == 0:
            yield i, start, state[:width]
        else:
            end = torch.empty_like(start)
            yield i, start, end
            pieces[i + 1].copy_(end[:running])
            state[running:width] = end[running:]


def walk_back(pieces: tuple[Tensor, ...], dstate: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk the gradient of states backward through the steps of a segment.

    Args:
        pieces: memory for the gradients of the states after each step.
        dstate: gradient of every sequence's state after the segment, or after its end if that
            comes first; becomes the gradient before the segment.

    Yields:
        the index of a step, the gradients after it, and where to put those before it.
    """
    pieces[-1].copy_(dstate[: pieces[-1].shape[0]])
    for i in reversed(range(1, len(pieces))):
        running, width = pieces[i].shape[0], pieces[i - 1].shape[0]
        yield i, pieces[i], pieces[i - 1][:running]
        if running < width:
            pieces[i - 1][running:] = dstate[running:width]
    yield 0, pieces[0], dstate[: pieces[0].shape[0]]
