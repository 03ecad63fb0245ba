"""Packed documents: where each one starts and stops."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor


def document_lengths(cu_seqlens: Tensor, time: int) -> list[int]:
    """Return the length of every packed document.

    Args:
        cu_seqlens: (N+1,) integer offsets of the document starts, and the total.
        time: T, the length of the packed row.

    Raises:
        ValueError: the offsets do not start at 0, fall, or do not end at ``time``.
    """
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != time:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at T = {time}, got {offsets[0]} and {offsets[-1]}"
        )
    lengths = [stop - start for start, stop in pairwise(offsets)]
    for index, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"cu_seqlens must not fall, got {offsets[index]} then {offsets[index + 1]} "
                f"at position {index + 1}"
            )
    return lengths


def document_bounds(
    cu_seqlens: Tensor | None, batch: int, time: int
) -> Iterator[tuple[slice, int, int]]:
    """Yield (rows of the state, start, stop) of each document, or of the whole batch at once."""
    if cu_seqlens is None:
        yield slice(0, batch), 0, time
        return
    start = 0
    for row, length in enumerate(document_lengths(cu_seqlens, time)):
        yield slice(row, row + 1), start, start + length
        start += length
