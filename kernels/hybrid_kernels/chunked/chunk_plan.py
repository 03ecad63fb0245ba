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
from functools import cached_property

import torch
from torch import Tensor

from hybrid_kernels.packing import Documents


@dataclass(frozen=True)
class ChunkSpan:
    """A run of consecutive steps that is computed together.

    Attributes:
        lead: slice of the leading axis of ``ChunkPlan.chunks``.
        offsets: first chunk of each step, counted from the segment's own first, and their total.
        widths: number of sequences that run at each step.
    """

    lead: slice
    offsets: list[int]
    widths: list[int]

    @property
    def width(self) -> int:
        """Number of sequences that run at the segment's first step."""
        return self.widths[0]

    def states(self, heads: int) -> int:
        """Return how many states lie before and after the steps, ``heads`` to a sequence."""
        rows = self.offsets[-1]
        return (rows + self.width if self.dense else 2 * rows) * heads

    @property
    def dense(self) -> bool:
        """Whether all sequences outlast the segment: the states after a step are then the next's."""
        return self.widths[0] == self.widths[-1]

    def before_and_after(self, states: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Cut memory for ``states`` into those before and those after each step, which may overlap."""
        rows = self.offsets[-1] * heads
        return states[:rows], states[self.width * heads if self.dense else rows :]


class ChunkPlan:
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

    @cached_property
    def segments(self) -> list[ChunkSpan]:
        """The steps cut into segments; empty without sequences."""
        found, step = [], 0
        while step < len(self.widths) and self.widths[step]:
            span = self.span(self.widths[step])
            stop = min(step + span // self.chunk, len(self.widths))
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

        Never a view: autograd lets nobody write to one that a custom op returns beside others.
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
    x: Tensor, chunk: int, span: Callable[[int], int], packed: Documents | None
) -> ChunkPlan:
    """Return the plan for an input (B, T, ...); of packed documents, one for all calls alike.

    Args:
        x: any input of the op.
        chunk: C.
        span: as ``ChunkPlan`` takes it; compared by value.
        packed: the documents, or None for a plain batch.
    """
    batch, time = x.shape[:2]
    if packed is None:
        return ChunkPlan(batch, time, chunk, span, None, x.device)
    return packed.plan(
        (chunk, span, x.device),
        lambda: ChunkPlan(batch, time, chunk, span, packed.lengths, x.device),
    )


def load(
    chunks: Tensor,
    dtype: torch.dtype,
    factor: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gather chunks of G heads into (R*G, C, ...), times ``factor``, in ``dtype``.

    Args:
        chunks: (leading, sequences, G, C, ...).
        dtype: of the result.
        factor: something that broadcasts to the result, with its leading axis or one-dimensional.
        out: where to put the result, in the one shape or the other; without it and without a
            factor, the result may be a view.
    """
    if out is None:
        if factor is None:
            return chunks.to(dtype).flatten(0, 2)
        shape = (chunks.shape[:3].numel(), *chunks.shape[3:])
        out = torch.empty(shape, dtype=dtype, device=chunks.device)
    target = out if out.shape == chunks.shape else out.view(chunks.shape)
    if factor is None:
        target.copy_(chunks)
    else:
        torch.mul(chunks, _by_chunk(factor, chunks), out=target)
    return out


def store(chunks: Tensor, x: Tensor, factor: Tensor | None = None) -> None:
    """Scatter (R*G, C, ...), times ``factor``, into chunks of G heads as ``load`` takes them."""
    x = x.view(chunks.shape)
    if factor is None:
        chunks.copy_(x)
    else:
        torch.mul(x, _by_chunk(factor, chunks), out=chunks)


def _by_chunk(factor: Tensor, chunks: Tensor) -> Tensor:
    """View (R*G, ...) as (leading, sequences, G, ...), as ``chunks`` is, unless it is already."""
    if factor.dim() in (1, chunks.dim()):
        return factor
    return factor.view(chunks.shape[:3] + factor.shape[1:])


class StateCarry:
    """The states that go from one segment to the next, or their gradient, the other way.

    Args:
        states: (N G, K, r V) those before the first segment; filled with those after the last.
        plan: of the chunks.
    """

    def __init__(self, states: Tensor, plan: ChunkPlan):
        self._states = self._now = states
        # Then all sequences outlast every segment, and their states can stay where a step put them.
        self._plain = plan.tokens is None

    @classmethod
    def again(cls, states: Tensor, plan: ChunkPlan) -> StateCarry:
        """Carry ``states`` through one segment once more; they stay as they are."""
        # Of packed documents, those that end in the segment would be written over.
        return cls(states if plan.tokens is None else states.clone(), plan)

    def enter(self, memory: Tensor) -> None:
        """Put the states where a segment wants them, before anything else is written there.

        Args:
            memory: for the states of those that run at the segment's first step.
        """
        if memory.data_ptr() != self._now.data_ptr():
            memory.copy_(self._now[: memory.shape[0]])

    def leave(self, memory: Tensor, rows: slice | None = None) -> None:
        """Take the states that a step left in ``memory``, of all sequences or of some."""
        if self._plain:
            self._now = memory
        else:
            self._states[rows or slice(memory.shape[0])] = memory

    def ended(self, rows: slice) -> Tensor:
        """Return those of sequences that ended before, for a walk backward."""
        return self._states[rows]

    def finish(self) -> None:
        """Fill the states that this was made of."""
        if self._now is not self._states:
            self._states.copy_(self._now)


def walk(
    starts: tuple[Tensor, ...], ends: tuple[Tensor, ...], carried: StateCarry
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk states forward through the steps of a segment.

    Args:
        starts, ends: memory for the states before and after each step; the first of the former has
            been filled (``StateCarry.enter``).
        carried: takes those of sequences that end in the segment or outlast it.

    Yields:
        the index of a step, the states before it, and where to put those after it.
    """
    if starts[0].shape[0] == ends[-1].shape[0]:
        yield from zip(range(len(starts)), starts, ends, strict=True)
    else:
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            yield i, start, end
            running = len(starts[i + 1]) if i + 1 < len(starts) else 0
            carried.leave(end[running:], slice(running, len(end)))
            if running:
                starts[i + 1].copy_(end[:running])
    carried.leave(ends[-1])


def accumulate(
    starts: tuple[Tensor, ...],
    ends: tuple[Tensor, ...],
    carried: StateCarry,
    totals: tuple[Tensor, ...] | None,
) -> None:
    """Walk states forward, adding to what ``ends`` hold the states before, decayed by ``totals``.

    Args:
        starts, ends, carried: as for ``walk``.
        totals: by step, something that broadcasts to its states, or None for no decay.
    """
    for i, start, end in walk(starts, ends, carried):
        if totals is None:
            end.add_(start)
        else:
            end.addcmul_(start, totals[i])


def walk_back(
    befores: tuple[Tensor, ...], afters: tuple[Tensor, ...], carried: StateCarry
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk the gradient of states backward through the steps of a segment.

    Args:
        befores, afters: memory for the gradients of the states before and after each step; the last
            of the latter has been filled (``StateCarry.enter``).
        carried: gradient of every sequence's state after the segment, or after its end if that
            comes first; takes the gradient before the segment.

    Yields:
        the index of a step, the gradients after it, and where to put those before it.
    """
    steps = reversed(range(len(befores)))
    if befores[0].shape[0] == afters[-1].shape[0]:
        yield from zip(steps, reversed(afters), reversed(befores), strict=True)
    else:
        for i in steps:
            yield i, afters[i], befores[i]
            if i:
                running = len(befores[i])
                afters[i - 1][:running] = befores[i]
                afters[i - 1][running:] = carried.ended(slice(running, len(afters[i - 1])))
    carried.leave(befores[0])
