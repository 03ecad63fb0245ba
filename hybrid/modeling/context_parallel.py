"""Context parallelism: each process holds a slice of the same rows, with earlier tokens on lower ranks.

A layer needs from the tokens before its slice what a cache would hold: keys and values for softmax
layers, states and the last inputs of convolutions for linear layers. A slice therefore runs as the
continuation of a prefill, with a "cache" on the previous process. Values that are stored in this cache
are sent to the next process. In the backward pass the gradients return the same way. This is the state
passing of LASP (arXiv 2404.02882), for every mixer. A process runs layer l + 1 while the next one runs
layer l, so a stack with more layers than processes keeps all processes busy.

Shapes: B rows, T tokens of a slice, N documents in the slices of this process, P processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)

from hybrid.nn.arguments import CACHE
from hybrid.nn.local_rows import LocalRows
from hybrid.nn.packing import WHOLE_ROWS, Segments, from_positions
from hybrid.nn.past import Past

# A message of unknown shape has a header: its key, dtype, number of dimensions, and dimensions.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_DIMENSIONS = 6

_NAMES: dict[int, str] = {}  # names by checksum, for error messages


class Key(NamedTuple):
    """Key of a message: the sender. It includes B and T because shapes depend on them."""

    batch: int
    time: int
    layer: int
    slot: int
    name: int
    """Checksum of the name in the slot."""


@dataclass
class ContextGroup:
    """Group of processes that share rows, in the order of their slices.

    Attributes:
        group: process group of torch.distributed. Do not send other messages in it: messages are matched
            by their order.
        pending: messages being sent, with tensors that must stay alive.
        shapes: dtype and shape of the previous process's message for each key, which is sent once.
        announced: keys whose dtype and shape were sent to the next process.
    """

    group: dist.ProcessGroup
    pending: list[tuple[dist.Work, torch.Tensor]] = field(default_factory=list)
    shapes: dict[Key, tuple[torch.dtype, list[int]]] = field(default_factory=dict)
    announced: set[Key] = field(default_factory=set)

    @property
    def size(self) -> int:
        """Number of processes P."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Index of this process's slice, from 0."""
        return dist.get_rank(self.group)

    @property
    def is_first(self) -> bool:
        """Whether this process holds the start of the rows."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this process holds the end of the rows."""
        return self.rank == self.size - 1

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Gather x from every process, in order."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def send(self, x: torch.Tensor, step: int) -> None:
        """Send x to the previous (-1) or next (1) process, without waiting for completion."""
        self.pending = [(work, kept) for work, kept in self.pending if not work.is_completed()]
        x = x.detach().contiguous()
        work = dist.isend(x, dist.get_global_rank(self.group, self.rank + step), self.group)
        assert work is not None
        self.pending.append((work, x))

    def receive(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """Receive from the previous (-1) or next (1) process into x, and wait for it."""
        dist.recv(x, dist.get_global_rank(self.group, self.rank + step), self.group)
        return x

    def send_on(self, x: torch.Tensor, key: Key) -> None:
        """Send x to the next process; for a new key, first send a header with dtype and shape."""
        if key not in self.announced:
            numbers = [*key, DTYPES.index(x.dtype), x.ndim, *x.shape]
            self.send(_header(numbers, x.device), 1)
            self.announced.add(key)
        self.send(x, 1)

    def receive_on(self, key: Key, device: torch.device) -> torch.Tensor:
        """Receive the tensor that the previous process sends for the same key.

        Raises:
            ValueError: the next message has another key.
        """
        if key not in self.shapes:
            numbers = self.receive(_header([], device), -1).tolist()
            sent, (dtype, dimensions, *shape) = Key(*numbers[: len(key)]), numbers[len(key) :]
            if sent != key:
                raise ValueError(
                    f"layer {key.layer}: expected a mixer that reads and stores its cache entries in one"
                    f" order, got {_NAMES[key.name]!r} of slot {key.slot} read first and"
                    f" {_NAMES.get(sent.name)!r} of slot {sent.slot} stored first; try the same order in"
                    " the mixer's forward"
                )
            self.shapes[key] = DTYPES[dtype], shape[:dimensions]
        dtype, shape = self.shapes[key]
        return self.receive(torch.empty(shape, dtype=dtype, device=device), -1)


def _header(numbers: list[int], device: torch.device) -> torch.Tensor:
    room = len(Key._fields) + 2 + MOST_DIMENSIONS
    return torch.tensor([*numbers, *[0] * (room - len(numbers))], device=device)


class _Send(torch.autograd.Function):
    """Send x to the next process and return a scalar; the gradient of x comes from that process."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, group: ContextGroup, key: Key):
        ctx.group, ctx.like = group, torch.empty_like(x, device="meta")
        ctx.device = x.device
        group.send_on(x, key)
        return x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):
        grad = torch.empty(ctx.like.shape, dtype=ctx.like.dtype, device=ctx.device)
        return ctx.group.receive(grad, 1), None, None, None


class _Receive(torch.autograd.Function):
    """Receive a tensor from the previous process; its gradient is sent back to that process."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, group: ContextGroup, key: Key):
        ctx.group = group
        return group.receive_on(key, anchor.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):
        ctx.group.send(grads[0], -1)
        return None, None, None


class _Tie(torch.autograd.Function):
    """Identity of x that also depends on ``others``, so that their backward passes run."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *others: torch.Tensor):
        ctx.others = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        return grads[0], *[None] * ctx.others


class Neighbours(Past):
    """Past of one forward pass over a slice: the earlier tokens are on the previous process.

    Args:
        group: the processes.
        position_ids: (1 or B, T), positions of this slice. A position that does not follow the previous
            one starts a new document. None for one document per row.
        x: (B, T, D), input of the stack.
    """

    def __init__(
        self, group: ContextGroup, position_ids: torch.Tensor | None, x: torch.Tensor
    ) -> None:
        self.group, (self.batch, self.time) = group, x.shape[:2]
        self.past = group.rank * self.time
        # messages must be in the graph even if no input needs a gradient (frozen embeddings)
        self.anchor = torch.zeros((), device=x.device, requires_grad=torch.is_grad_enabled())
        self.ties: list[torch.Tensor] = []
        if position_ids is None:
            position_ids = torch.arange(self.past, self.past + self.time, device=x.device)[None]
        self.position_ids = position_ids.expand(self.batch, -1)
        self.documents = self._documents()
        self.segments = WHOLE_ROWS
        self.first = self.last = torch.arange(self.batch, device=x.device)
        if self.documents is not None:
            self.segments = from_positions(self.position_ids, self.batch)
        if self.segments.cu_seqlens is not None:
            starts = torch.arange(self.batch + 1, device=x.device) * self.time
            bounds = torch.searchsorted(self.segments.cu_seqlens.long(), starts)
            self.first, self.last = bounds[:-1], bounds[1:] - 1

    def _documents(self) -> torch.Tensor | None:
        """Return the document index of all tokens up to the end of this slice, (B, past + T)."""
        whole = torch.cat(self.group.gather(self.position_ids), dim=1)
        documents = find_packed_sequence_indices(whole)
        return None if documents is None else documents[:, : self.past + self.time]

    @property
    def continues(self) -> torch.Tensor:
        """Bool (B,): whether the first document of a row started on an earlier process."""
        if self.documents is None:
            return torch.ones(self.batch, dtype=torch.bool, device=self.position_ids.device)
        return self.documents[:, self.past] == self.documents[:, self.past - 1]

    def mask(self, config: PreTrainedConfig, x: torch.Tensor) -> Any:
        """Return transformers' causal mask of T queries over past + T keys, within documents."""
        within = None
        if self.documents is not None:
            within = packed_sequence_mask_function(self.documents)
        return create_causal_mask(
            config=config,
            inputs_embeds=x,
            attention_mask=None,
            and_mask_function=within,
            **{CACHE: self},  # type: ignore[arg-type]
        )

    def local_rows(self) -> LocalRows:
        """Return the positions of the slice's tokens, for layers with bounded reach."""
        if self.documents is None:
            return LocalRows.plain(self.past, self.time, self.position_ids.device)
        column = torch.arange(self.documents.shape[1], device=self.documents.device)
        begins = torch.ones_like(self.documents, dtype=torch.bool)
        begins[:, 1:] = self.documents.diff(dim=1) != 0
        place = column - torch.where(begins, column, 0).cummax(dim=1).values
        return LocalRows(place[:, self.past :])

    # Cache interface used by `create_causal_mask`.

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens before this slice."""
        return self.past

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys, and the position of the first."""
        return self.past + query_length, 0

    # Interface `hybrid.nn.past.Past`.

    def slot(self, layer_idx: int, slot_idx: int) -> NeighbourSlot:
        """Return the past of one mixer."""
        return NeighbourSlot(self, layer_idx, slot_idx)

    def tie(self, x: torch.Tensor) -> torch.Tensor:
        """Make a layer's output x (B, T, D) depend on all messages that the layer sent and received."""
        ties, self.ties = self.ties, []
        return _Tie.apply(x, *ties) if ties and torch.is_grad_enabled() else x


@dataclass(frozen=True)
class NeighbourSlot:
    """``hybrid.nn.past.Slot`` whose past is on the previous process."""

    neighbours: Neighbours
    layer_idx: int
    slot_idx: int

    def append(
        self,
        *,
        window: int | None = None,
        lengths: torch.Tensor | None = None,
        **tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Prepend the earlier columns to ``tokens`` (B, heads, T, dim), and send those in reach onward.

        Slices have no padding, so ``lengths`` is None.
        """
        both = []
        for name, own in tokens.items():
            if not self.neighbours.group.is_first:
                own = torch.cat([self._receive(name).to(own.dtype), own], dim=2)
            first = 0 if window is None else max(0, own.shape[2] - window + 1)
            self._send(own[:, :, first:], name)
            both.append(own)
        return tuple(both)

    def state(self, name: str) -> torch.Tensor | None:
        """Return the initial state (N, ...) of each document; None on the first process."""
        near = self.neighbours
        if near.group.is_first:
            return None
        state = self._receive(name)
        state = state * near.continues.view(-1, *[1] * (state.ndim - 1)).to(state.dtype)
        if near.segments.cu_seqlens is None:
            return state
        initial = state.new_zeros(len(near.segments.cu_seqlens) - 1, *state.shape[1:])
        return initial.index_copy(0, near.first, state)

    def set_state(self, name: str, value: torch.Tensor) -> None:
        """Send the state after the last document of each row, from ``value`` (N, ...)."""
        whole = self.neighbours.segments.cu_seqlens is None
        self._send(value if whole else value[self.neighbours.last], name)

    def begin(
        self, x: torch.Tensor, segments: Segments, run: Callable[[torch.Tensor], object]
    ) -> None:
        """Do nothing: training removes no tokens."""

    def _key(self, name: str) -> Key:
        near = self.neighbours
        number = zlib.crc32(name.encode())
        _NAMES[number] = name
        return Key(near.batch, near.time, self.layer_idx, self.slot_idx, number)

    def _send(self, x: torch.Tensor, name: str) -> None:
        near = self.neighbours
        if not near.group.is_last:
            near.ties.append(_Send.apply(x, near.anchor, near.group, self._key(name)))

    def _receive(self, name: str) -> torch.Tensor:
        near = self.neighbours
        received = _Receive.apply(near.anchor, near.group, self._key(name))
        near.ties.append(received)
        return received
