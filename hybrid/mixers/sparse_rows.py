"""Arrangement of documents in rows, and banded attention, for native sparse attention.

Shapes: B rows, T time, N documents, H query heads, H_kv key heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def banded(
    attend: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """Attend within a band of ``width`` columns, in blocks of queries.

    Args:
        attend: function (q, k, v, mask) -> o (B, t, H, K) of a block, with equal heads of q, k and v.
        q: (B, H, T, K).
        k, v: (B, H_kv, S, K), S >= T; query t is at column t + S - T.
        first: (B or 1, T), first column that each query sees, above t + S - T - width.
        width: number of columns of the band.

    Returns:
        o (B, T, H, K).
    """
    time, ahead = q.shape[2], k.shape[2] - q.shape[2]
    columns = torch.arange(k.shape[2], device=q.device)
    groups = q.shape[1] // k.shape[1]
    k, v = (y.repeat_interleave(groups, dim=1) if groups > 1 else y for y in (k, v))
    block, outputs = max(width, 64), []
    for start in range(0, time, block):
        stop = min(start + block, time)
        seen = slice(max(0, start + ahead - width + 1), stop + ahead)
        at, key = columns[start + ahead : stop + ahead, None], columns[seen]
        mask = (key <= at) & (key >= first[:, start:stop, None])
        outputs.append(attend(q[:, :, start:stop], k[:, :, seen], v[:, :, seen], mask[:, None]))
    empty = v.new_empty(q.shape[0], 0, q.shape[1], v.shape[3])
    return torch.cat(outputs, dim=1) if outputs else empty


class DocumentRows:
    """Arrangement of packed documents with one row per document; whole rows are unchanged.

    Attributes:
        lengths: (N,), tokens of each document; None for whole rows.
    """

    def __init__(self, cu_seqlens: torch.Tensor | None, x: torch.Tensor) -> None:
        self.lengths: torch.Tensor | None = None
        if cu_seqlens is None:
            return
        bounds = cu_seqlens.long()
        self.lengths = bounds[1:] - bounds[:-1]
        token = torch.arange(x.shape[1], device=x.device)
        document = torch.searchsorted(bounds, token, right=True) - 1
        starts, self.shape = self.arrange(self.lengths)
        self.place = starts[document] + token - bounds[document]

    def arrange(self, lengths: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the flat index (N,) of the first token of each document, and the (rows, columns)."""
        longest = int(lengths.max())
        starts = longest * torch.arange(len(lengths), device=lengths.device)
        return starts, (len(lengths), longest)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Arrange (1, tokens, C) as (rows, columns, C), with zeros in empty columns."""
        if self.lengths is None:
            return x
        flat = x.new_zeros(self.shape[0] * self.shape[1], x.shape[2])
        return flat.index_copy(0, self.place, x[0]).view(*self.shape, x.shape[2])

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """Invert ``spread``: (rows, columns, C) to (1, tokens, C)."""
        return x if self.lengths is None else x.flatten(0, 1)[self.place][None]


class AlignedRow(DocumentRows):
    """Arrangement of packed documents in one row, each starting at a multiple of ``align``.

    Attributes:
        base: (1, columns), first column of the document of each column.
    """

    def __init__(self, cu_seqlens: torch.Tensor, x: torch.Tensor, align: int) -> None:
        self.align = align
        super().__init__(cu_seqlens, x)

    def arrange(self, lengths: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """See ``DocumentRows.arrange``."""
        ends = (-(-lengths // self.align) * self.align).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        columns = int(ends[-1])
        column = torch.arange(columns, device=lengths.device)
        self.base = starts[torch.searchsorted(ends, column, right=True)][None]
        return starts, (1, columns)
