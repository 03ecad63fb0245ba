"""Masks of softmax attention with bounded reach, computed once per forward for all layers.

Shapes: B rows, T tokens of the current forward, P columns of cached earlier tokens, S = P + T columns of
keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from hybrid.nn.packing import Segments


class Reach(NamedTuple):
    """Reach of a token: the last ``width`` tokens, or its chunk of ``width`` tokens up to itself."""

    width: int
    chunked: bool

    def __call__(self, place: torch.Tensor) -> torch.Tensor:
        """Return the number of earlier tokens that a token at position ``place`` attends to."""
        return place % self.width if self.chunked else place.clamp(max=self.width - 1)


@dataclass(eq=False)
class LocalRows:
    """Positions of the tokens of a forward, with padding moved to the end.

    Layers order the tokens of a row so that padding comes last. The distance of two tokens is then the
    distance of their columns, and cached tokens come directly before the new ones.

    Attributes:
        place: (B or 1, T) int64, number of earlier tokens in the document of each token, in that order.
        start: place of the first token if all rows are equal, without padding and boundaries; else None.
        order: (B, T), columns of a row in that order; None without padding.
        lengths: (B,), number of tokens of each row without padding; None for all.
    """

    place: torch.Tensor
    start: int | None = None
    order: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    _masks: dict[tuple, torch.Tensor | BlockMask | None] = field(default_factory=dict)

    @classmethod
    def plain(cls, start: int | torch.Tensor, time: int, device: torch.device) -> LocalRows:
        """Return rows without padding, with one document each, after ``start`` tokens."""
        place = torch.arange(time, device=device) + start
        return cls(place[None], start if isinstance(start, int) else None)

    @classmethod
    def find(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        start: int | torch.Tensor = 0,
        mask: torch.Tensor | None = None,
        segments: Segments | None = None,
    ) -> LocalRows:
        """Return the rows of a forward.

        Args:
            shape: B and T.
            device: device of the input.
            start: number of tokens in the cache.
            mask: (B, tokens in the cache + T), 0 at padding; None for no padding.
            segments: document boundaries and padding of the T tokens; None for neither.
        """
        batch, time = shape
        real = None
        if segments is not None and segments.index is not None:
            real = torch.zeros(batch * time, dtype=torch.bool, device=device)
            real = real.index_fill(0, segments.index, True).view(batch, time)
        before = None
        if mask is not None and mask.shape[1] > time:
            before = mask[:, :-time].bool().sum(dim=1, keepdim=True)
        if segments is not None and segments.places is not None:
            place = segments.places
        elif real is None and before is None:
            return cls.plain(start, time, device)
        else:
            ones = torch.ones(batch, time, dtype=torch.long, device=device)
            place = (ones if real is None else real.long()).cumsum(dim=1) - 1
            place = place if before is None else place + before
        place = place.clamp(min=0)
        if real is None:
            return cls(place)
        order = real.logical_not().to(torch.int8).argsort(dim=1, stable=True)
        return cls(place.gather(1, order), order=order, lengths=real.sum(dim=1))

    def arrange(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Move the padding of x to the end of dimension ``dim`` (time T)."""
        return x if self.order is None else _take(x, self.order, dim)

    def restore(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Invert ``arrange``."""
        return x if self.order is None else _take(x, self.order.argsort(dim=1), dim)

    def sees_all(self, reach: Reach, past: int) -> bool:
        """Return whether each row has one token, which attends to all P + 1 columns."""
        if self.start is None or self.place.shape[1] != 1:
            return False
        limit = self.start % reach.width if reach.chunked else min(self.start, reach.width - 1)
        return past <= limit

    def mask(self, reach: Reach, past: int, queries: slice, keys: slice) -> torch.Tensor:
        """Return a bool mask (B or 1, 1, t, s), True where a query attends to a key.

        Args:
            reach: reach of the layer.
            past: P.
            queries: slice of the T tokens.
            keys: slice of the P + T columns.
        """
        key = (reach, past, queries.start, queries.stop, keys.start, keys.stop)
        if key not in self._masks:
            device = self.place.device
            own = torch.arange(queries.start, queries.stop, device=device) + past
            column = torch.arange(keys.start, keys.stop, device=device)
            first = own - reach(self.place[:, queries])
            seen = (column <= own[:, None]) & (column >= first[..., None])
            self._masks[key] = seen[:, None]
        mask = self._masks[key]
        assert isinstance(mask, torch.Tensor)
        return mask

    def block_mask(self, reach: Reach, past: int) -> BlockMask:
        """Return the mask of all queries and keys as a ``BlockMask`` of flex attention."""
        key = (reach, past)
        if key not in self._masks:
            time = self.place.shape[1]
            own = torch.arange(time, device=self.place.device) + past
            first, each = own - reach(self.place), len(self.place) > 1

            def sees(b, h, q, k):
                return (k <= q + past) & (k >= first[b if each else 0, q])

            self._masks[key] = create_block_mask(
                sees, len(first) if each else None, None, time, past + time, str(first.device)
            )
        mask = self._masks[key]
        assert isinstance(mask, BlockMask)
        return mask

    def padding_mask(self, reach: Reach, past: int) -> torch.Tensor | None:
        """Return a mask (B, P + T) for flash attention, False at padding; None without padding."""
        key = ("padding", reach, past)
        if key not in self._masks:
            self._masks[key] = self._padding_mask(past)
        mask = self._masks[key]
        assert not isinstance(mask, BlockMask)
        return mask

    def _padding_mask(self, past: int) -> torch.Tensor | None:
        if self.start is not None and self.start >= past:
            return None
        column = torch.arange(past + self.place.shape[1], device=self.place.device)
        mask = column >= past - self.place[:, :1]
        if self.lengths is not None:
            mask = mask & (column < past + self.lengths[:, None])
        return None if bool(mask.all()) else mask


def _take(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Return x[b, ..., index[b, t], ...] with t at dimension ``dim``."""
    view = [1] * x.ndim
    view[0], view[dim] = index.shape
    shape = list(x.shape)
    return x.gather(dim, index.view(view).expand(shape))
