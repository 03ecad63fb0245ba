"""Which tokens a token sees in softmax attention of bounded reach: made once a forward, for all layers.

Shapes: B rows, T tokens of the present forward, P columns of earlier tokens that a layer has kept,
S = P + T columns of keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from hybrid.nn.packing import Segments


class Reach(NamedTuple):
    """How far a token sees: over the last `width` tokens, or back to the start of its chunk of them."""

    width: int
    chunked: bool

    def __call__(self, place: torch.Tensor) -> torch.Tensor:
        """How many tokens before it a token sees that has `place` tokens of its document before it."""
        return place % self.width if self.chunked else place.clamp(max=self.width - 1)


@dataclass(eq=False)
class LocalRows:
    """Where the tokens of a forward stand.

    Layers take the tokens of a row in an order in which padding comes last, so that the column of a
    token tells its distance from all others, and earlier tokens stand directly before them.

    Attributes:
        place: (B or 1, T) int64, tokens of its document before each, in that order.
        start: the place of the first, where the rows are the same, without padding and boundaries; else
            None.
        order: (B, T), the columns of a row in that order; None where there is no padding.
        lengths: (B,), tokens of each row that are not padding; None for all.
    """

    place: torch.Tensor
    start: int | None = None
    order: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    _masks: dict[tuple, torch.Tensor | BlockMask | None] = field(default_factory=dict)

    @classmethod
    def plain(cls, start: int | torch.Tensor, time: int, device: torch.device) -> LocalRows:
        """Rows without padding, of one document each, after `start` tokens."""
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
        """The rows of a forward.

        Args:
            shape: B and T.
            device: of the input.
            start: tokens in the cache.
            mask: (B, tokens in the cache + T), 0 at padding; None for none.
            segments: documents and padding of these T tokens; None for neither.
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
        """x with time T as dimension `dim`, its padding moved to the end."""
        return x if self.order is None else _take(x, self.order, dim)

    def restore(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse of `arrange`."""
        return x if self.order is None else _take(x, self.order.argsort(dim=1), dim)

    def sees_all(self, reach: Reach, past: int) -> bool:
        """Whether the one token of each row sees all P + 1 columns."""
        if self.start is None or self.place.shape[1] != 1:
            return False
        limit = self.start % reach.width if reach.chunked else min(self.start, reach.width - 1)
        return past <= limit

    def mask(self, reach: Reach, past: int, queries: slice, keys: slice) -> torch.Tensor:
        """(B or 1, 1, t, s) bool, True where a query sees a key.

        Args:
            reach: how far.
            past: P.
            queries: of the T tokens.
            keys: of the P + T columns.
        """
        key = (reach, past, queries.start, queries.stop, keys.start, keys.stop)
        if key not in self._masks:
            device = self.place.device
            own = torch.arange(queries.start, queries.stop, device=device) + past
            column = torch.arange(keys.start, keys.stop, device=device)
            first = own - reach(self.place[:, queries])
            seen = (column <= own[:, None]) & (column >= first[..., None])
            self._masks[key] = seen[:, None]
        found = self._masks[key]
        assert isinstance(found, torch.Tensor)
        return found

    def block_mask(self, reach: Reach, past: int) -> BlockMask:
        """The same for all queries and keys, for flex attention."""
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
        found = self._masks[key]
        assert isinstance(found, BlockMask)
        return found

    def padding_mask(self, reach: Reach, past: int) -> torch.Tensor | None:
        """(B, P + T), False at columns without a token; None where all have one (flash attention)."""
        key = ("padding", reach, past)
        if key not in self._masks:
            self._masks[key] = self._padding_mask(past)
        found = self._masks[key]
        assert not isinstance(found, BlockMask)
        return found

    def _padding_mask(self, past: int) -> torch.Tensor | None:
        if self.start is not None and self.start >= past:
            return None
        column = torch.arange(past + self.place.shape[1], device=self.place.device)
        mask = column >= past - self.place[:, :1]
        if self.lengths is not None:
            mask = mask & (column < past + self.lengths[:, None])
        return None if bool(mask.all()) else mask


def _take(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """x[b, ..., index[b, t], ...] with t in the place of `dim`."""
    view = [1] * x.ndim
    view[0], view[dim] = index.shape
    shape = list(x.shape)
    return x.gather(dim, index.view(view).expand(shape))
