"""Packed documents: where each one starts and stops, read once for all layers of a forward pass.

The layers of a model are handed one ``cu_seqlens`` tensor. Its values are read, checked and turned
into chunk plans when the first op sees it (``documents``); every other op, forward and backward,
finds them there. Writing to the tensor invalidates them (its version counter changes).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Documents:
    """The documents packed in one row.

    Attributes:
        lengths: of each, in tokens.
        plans: what backends derived from them, by key.
    """

    lengths: list[int]
    plans: dict[Hashable, Any] = field(default_factory=dict)

    def plan(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """Return the plan under a key, computed once.

        Args:
            key: everything that the plan depends on besides the documents.
            make: computes the plan.
        """
        if key not in self.plans:
            self.plans[key] = make()
        return self.plans[key]


# Offsets tensor (a weak key) -> its version, and its documents.
_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def documents(cu_seqlens: Tensor, time: int) -> Documents:
    """Return the documents of an offsets tensor, the same object until the tensor is written to.

    Args:
        cu_seqlens: (N+1,) integer offsets of the document starts, and the total.
        time: T, the length of the packed row.

    Raises:
        ValueError: the offsets do not start at 0, descend, or do not end at ``time``.
    """
    # Inference tensors have no version counter, and autograd cannot save plans made from them.
    if torch.is_inference_mode_enabled() or cu_seqlens.is_inference():
        return Documents(_lengths(cu_seqlens.tolist(), time))
    known = _KNOWN.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        known = cu_seqlens._version, Documents(_lengths(cu_seqlens.tolist(), time))
        _KNOWN[cu_seqlens] = known
    found = known[1]
    if sum(found.lengths) != time:
        raise _wrong_ends(0, sum(found.lengths), time)
    return found


def _lengths(offsets: list[int], time: int) -> list[int]:
    if offsets[0] != 0 or offsets[-1] != time:
        raise _wrong_ends(offsets[0], offsets[-1], time)
    lengths = [stop - start for start, stop in pairwise(offsets)]
    for index, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"cu_seqlens: expected ascending offsets, got {offsets[index]} then "
                f"{offsets[index + 1]} at position {index + 1}"
            )
    return lengths


def _wrong_ends(first: int, last: int, time: int) -> ValueError:
    return ValueError(
        f"cu_seqlens: expected to start at 0 and end at T = {time}, got {first} and {last}"
    )


def document_bounds(
    cu_seqlens: Tensor | None, batch: int, time: int
) -> Iterator[tuple[slice, int, int]]:
    """Yield (rows of the state, start, stop) of each document, or of the whole batch at once."""
    if cu_seqlens is None:
        yield slice(0, batch), 0, time
        return
    start = 0
    for row, length in enumerate(documents(cu_seqlens, time).lengths):
        yield slice(row, row + 1), start, start + length
        start += length
