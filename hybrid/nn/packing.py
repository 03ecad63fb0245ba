"""Padding and packing, for mixers that carry a state: one mechanism for both.

A recurrence must neither see padding nor cross from one document into the next. Both are the same
thing: the real tokens of a batch are a list of documents in a batch of one, with boundaries
`cu_seqlens`. A padded batch has one document per row, whose padding is left out (left, right or in
between); a packed batch has as many as its position ids restart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.masking_utils import find_packed_sequence_indices


@dataclass(frozen=True)
class Segments:
    """Documents of a batch, as the linear ops want them.

    Attributes:
        cu_seqlens: (N + 1,) int32, boundaries of the N documents in the packed order; None where
            every row is one whole document.
        index: (tokens,) int64, places of the real tokens in the flattened batch (B * T); None where
            every token is real.
    """

    cu_seqlens: torch.Tensor | None = None
    index: torch.Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether rows hold documents without padding, as opposed to one document each."""
        return self.cu_seqlens is not None and self.index is None

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (1, tokens, ...); unchanged where every row is one whole document."""
        if self.cu_seqlens is None:
            return x
        flat = x.flatten(0, 1)
        return (flat if self.index is None else flat[self.index]).unsqueeze(0)

    def unpack(self, y: torch.Tensor, batch: int, time: int) -> torch.Tensor:
        """(1, tokens, D) -> (B, T, D), zeros at padding; the inverse of `pack`."""
        if self.cu_seqlens is None:
            return y
        if self.index is None:
            return y.view(batch, time, *y.shape[2:])
        out = y.new_zeros(batch * time, *y.shape[2:])
        return out.index_copy(0, self.index, y[0]).view(batch, time, *y.shape[2:])


WHOLE_ROWS = Segments()


def from_padding(mask: torch.Tensor | None, time: int) -> Segments:
    """Segments of a padded batch.

    Args:
        mask: (B, T_total) with 0 at padding, as a tokenizer returns it; only the last `time` columns,
            those of the present forward, count. None for no padding.
        time: T of the present forward.
    """
    if mask is None:
        return WHOLE_ROWS
    mask = mask[:, -time:].bool()
    if bool(mask.all()):
        return WHOLE_ROWS
    lengths = mask.sum(dim=1)
    return Segments(_boundaries(lengths), mask.flatten().nonzero().squeeze(1))


def from_positions(position_ids: torch.Tensor, batch: int) -> Segments:
    """Segments of packed documents: a new one wherever the position ids do not go up by one.

    Args:
        position_ids: (1 or B, T).
        batch: B.
    """
    ids = find_packed_sequence_indices(position_ids)
    if ids is None:
        return WHOLE_ROWS
    ids = ids.expand(batch, -1)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begin = starts.flatten().nonzero().squeeze(1)
    end = begin.new_tensor([ids.numel()])
    return Segments(torch.cat([begin, end]).to(torch.int32))


def _boundaries(lengths: torch.Tensor) -> torch.Tensor:
    zero = lengths.new_zeros(1)
    return torch.cat([zero, lengths.cumsum(0)]).to(torch.int32)
