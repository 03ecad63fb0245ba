"""Walks of states, or of their gradients, through the steps of a span.

Shapes: N sequences, G heads of q and k, K key dim, r V value dims per G.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from hybrid_kernels.chunked.chunk_plan import ChunkPlan, ChunkSpan


class SpanStates(NamedTuple):
    """States, or their gradients, around the chunks of a span.

    Attributes:
        starts: (b, K, r V) those before each chunk.
        ends: (b, K, r V) those after each chunk; may overlap ``starts`` in memory.
        step_starts: ``starts`` by step.
        step_ends: ``ends`` by step.
    """

    starts: Tensor
    ends: Tensor
    step_starts: tuple[Tensor, ...]
    step_ends: tuple[Tensor, ...]


def split_states(memory: Tensor, span: ChunkSpan, heads: int) -> SpanStates:
    """Split memory for ``span.states(heads)`` states."""
    starts, ends = span.before_and_after(memory, heads)
    sizes = span.sizes(heads)
    return SpanStates(starts, ends, starts.split_with_sizes(sizes), ends.split_with_sizes(sizes))


class StateCarry:
    """The states that go from one span to the next, or their gradient, the other way.

    Args:
        states: (N G, K, r V) those before the first span; filled with those after the last.
        plan: of the chunks.
    """

    def __init__(self, states: Tensor, plan: ChunkPlan):
        self._states = self._now = states
        # Then all sequences outlast every span, and their states can stay where a step put them.
        self._plain = plan.tokens is None

    @classmethod
    def again(cls, states: Tensor, plan: ChunkPlan) -> StateCarry:
        """Carry ``states`` through one span once more; they stay as they are."""
        # Of packed documents, those that end in the span would be written over.
        return cls(states if plan.tokens is None else states.clone(), plan)

    def enter(self, memory: Tensor) -> None:
        """Copy the states into the memory of a span, before anything else is written there.

        Args:
            memory: for the states of those that run at the span's first step.
        """
        if memory.data_ptr() != self._now.data_ptr():
            memory.copy_(self._now[: memory.shape[0]])

    def leave(self, memory: Tensor, rows: slice | None = None) -> None:
        """Carry on the states that a step left in ``memory``, of all sequences or of some."""
        if self._plain:
            self._now = memory
        else:
            self._states[rows or slice(memory.shape[0])] = memory

    def ended(self, rows: slice) -> Tensor:
        """Return the gradients of sequences that ended before, for a walk backward."""
        return self._states[rows]

    def finish(self) -> None:
        """Write the carried states into the tensor that this was constructed from."""
        if self._now is not self._states:
            self._states.copy_(self._now)


def walk(
    starts: tuple[Tensor, ...], ends: tuple[Tensor, ...], carried: StateCarry
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk states forward through the steps of a span.

    Args:
        starts, ends: memory for the states before and after each step; the first of the former has
            been filled (``StateCarry.enter``).
        carried: takes those of sequences that end in the span or outlast it.

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
    """Walk the gradient of states backward through the steps of a span.

    Args:
        befores, afters: memory for the gradients of the states before and after each step; the last
            of the latter has been filled (``StateCarry.enter``).
        carried: gradient of every sequence's state after the span, or after its end if that
            comes first; takes the gradient before the span.

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
