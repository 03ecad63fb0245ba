"""Context parallelism: each process holds a slice of the same rows, the earlier tokens the lower rank.

What a layer needs of the tokens before its slice is what it would find in a cache: keys and values in a
softmax layer, states and tails of convolutions in a linear one. So a slice runs as the continuation of a
prefill, with a "cache" whose past is on the process before. What is stored there goes on to the process
after, and in the backward pass the gradients come back the same way (the state passing of LASP, arXiv
2404.02882, for every mixer at once). A process is at layer l + 1 while the next one is at layer l, so a
stack deeper than the number of processes keeps them all busy.

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

# A message of unknown shape has a header: whose it is, its dtype, its number of dimensions, and these.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_DIMENSIONS = 6

_NAMES: dict[int, str] = {}  # by their checksums, for messages


class Key(NamedTuple):
    """Whose message it is; B and T are in it because shapes depend on them."""

    batch: int
    time: int
    layer: int
    slot: int
    name: int
    """A checksum of the name in the slot."""


@dataclass
class ContextGroup:
    """The processes that share rows, in the order of their slices.

    Attributes:
        group: of torch.distributed. Nothing else may send in it: the order of messages is all that tells
            them apart.
        pending: messages on their way, kept until they have left.
        shapes: what the process before sends under a key; it says so once.
        announced: keys for which the process after has been told.
    """

    group: dist.ProcessGroup
    pending: list[tuple[dist.Work, torch.Tensor]] = field(default_factory=list)
    shapes: dict[Key, tuple[torch.dtype, list[int]]] = field(default_factory=dict)
    announced: set[Key] = field(default_factory=set)

    @property
    def size(self) -> int:
        """P."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this process's slice, from 0."""
        return dist.get_rank(self.group)

    @property
    def is_first(self) -> bool:
        """Whether rows begin here."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether rows end here."""
        return self.rank == self.size - 1

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x of every process, in order."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous(), group=self.group)
        return found

    def send(self, x: torch.Tensor, step: int) -> None:
        """Send x to the process before (-1) or after (1), without waiting until it has left."""
        self.pending = [(work, kept) for work, kept in self.pending if not work.is_completed()]
        x = x.detach().contiguous()
        work = dist.isend(x, dist.get_global_rank(self.group, self.rank + step), self.group)
        assert work is not None
        self.pending.append((work, x))

    def receive(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """Wait for what the process before (-1) or after (1) sends, and write it to x."""
        dist.recv(x, dist.get_global_rank(self.group, self.rank + step), self.group)
        return x

    def send_on(self, x: torch.Tensor, key: Key) -> None:
        """Send x to the process after; the first time under this key, what it is, before it."""
        if key not in self.announced:
            numbers = [*key, DTYPES.index(x.dtype), x.ndim, *x.shape]
            self.send(_header(numbers, x.device), 1)
            self.announced.add(key)
        self.send(x, 1)

    def receive_on(self, key: Key, device: torch.device) -> torch.Tensor:
        """Wait for what the process before sends under the same key.

        Raises:
            ValueError: it sends something else first.
        """
        if key not in self.shapes:
            numbers = self.receive(_header([], device), -1).tolist()
            found, (dtype, dimensions, *shape) = Key(*numbers[: len(key)]), numbers[len(key) :]
            if found != key:
                raise ValueError(
                    f"layer {key.layer} reads {_NAMES[key.name]!r} of slot {key.slot} before"
                    f" {_NAMES.get(found.name)!r} of {found.slot}, and stores them the other way round:"
                    " across processes the order must be one"
                )
            self.shapes[key] = DTYPES[dtype], shape[:dimensions]
        dtype, shape = self.shapes[key]
        return self.receive(torch.empty(shape, dtype=dtype, device=device), -1)


def _header(numbers: list[int], device: torch.device) -> torch.Tensor:
    room = len(Key._fields) + 2 + MOST_DIMENSIONS
    return torch.tensor([*numbers, *[0] * (room - len(numbers))], device=device)


class _Send(torch.autograd.Function):
    """x -> a token; its gradient is what the process after sends back."""

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
    """What the process before sent; the gradient goes back to it."""

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
    """x, which from here on depends on `others` too, so that their backward passes run."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *others: torch.Tensor):
        ctx.others = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        return grads[0], *[None] * ctx.others


class Neighbours(Past):
    """One forward over a slice: the past on the process before, for every layer.

    Args:
        group: the processes.
        position_ids: (1 or B, T), those of this slice; a new document wherever they do not go up by one.
            None for rows that are one document each.
        x: (B, T, D), the input of the stack.
    """

    def __init__(
        self, group: ContextGroup, position_ids: torch.Tensor | None, x: torch.Tensor
    ) -> None:
        self.group, (self.batch, self.time) = group, x.shape[:2]
        self.past = group.rank * self.time
        # what no input needs a gradient for (frozen embeddings) must still be in the graph
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
        """Numbers of the documents of all tokens up to the end of this slice, (B, past + T)."""
        whole = torch.cat(self.group.gather(self.position_ids), dim=1)
        found = find_packed_sequence_indices(whole)
        return None if found is None else found[:, : self.past + self.time]

    @property
    def continues(self) -> torch.Tensor:
        """(B,), whether the first document of a row began on a process before."""
        if self.documents is None:
            return torch.ones(self.batch, dtype=torch.bool, device=self.position_ids.device)
        return self.documents[:, self.past] == self.documents[:, self.past - 1]

    def mask(self, config: PreTrainedConfig, x: torch.Tensor) -> Any:
        """transformers' causal mask of T queries over past + T keys, within documents."""
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
        """Where the tokens of the slice stand, for layers of bounded reach."""
        if self.documents is None:
            return LocalRows.plain(self.past, self.time, self.position_ids.device)
        column = torch.arange(self.documents.shape[1], device=self.documents.device)
        begins = torch.ones_like(self.documents, dtype=torch.bool)
        begins[:, 1:] = self.documents.diff(dim=1) != 0
        place = column - torch.where(begins, column, 0).cummax(dim=1).values
        return LocalRows(place[:, self.past :])

    # What `create_causal_mask` asks of a cache.

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this slice."""
        return self.past

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys in all, and the place of the first."""
        return self.past + query_length, 0

    # `hybrid.nn.past.Past`.

    def slot(self, layer_idx: int, slot_idx: int) -> NeighbourSlot:
        """The past of one mixer."""
        return NeighbourSlot(self, layer_idx, slot_idx)

    def tie(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, D) of the end of a layer, with all that the layer sent and received."""
        ties, self.ties = self.ties, []
        return _Tie.apply(x, *ties) if ties and torch.is_grad_enabled() else x


@dataclass(frozen=True)
class NeighbourSlot:
    """`hybrid.nn.past.Slot` whose past is on the process before."""

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
        """Put the earlier columns before these (B, heads, T, dim), and send on what the next may see.

        Slices have no padding, so `lengths` is None.
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
        """The state (N, ...) that each document begins with; None where rows begin here."""
        near = self.neighbours
        if near.group.is_first:
            return None
        came = self._receive(name)
        came = came * near.continues.view(-1, *[1] * (came.ndim - 1)).to(came.dtype)
        if near.segments.cu_seqlens is None:
            return came
        begin = came.new_zeros(len(near.segments.cu_seqlens) - 1, *came.shape[1:])
        return begin.index_copy(0, near.first, came)

    def set_state(self, name: str, value: torch.Tensor) -> None:
        """Send on the state after the last document of each row, of (N, ...)."""
        whole = self.neighbours.segments.cu_seqlens is None
        self._send(value if whole else value[self.neighbours.last], name)

    def begin(
        self, x: torch.Tensor, segments: Segments, run: Callable[[torch.Tensor], object]
    ) -> None:
        """Nothing: no token is taken back in training."""

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
        came = _Receive.apply(near.anchor, near.group, self._key(name))
        near.ties.append(came)
        return came
