"""Memory that the spans of one pass reuse, and rows moved between chunks and that memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Buffers = TypeVar("Buffers")


class Scratch:
    """Named stretches of memory that every span of a pass fills again.

    Fresh memory would be mapped and cleared page by page each time; this memory stays in the cache.
    Taking a name again returns the same memory, with undefined contents.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._whole: dict[str, Tensor] = {}
        self._views: dict[tuple, Tensor] = {}
        self._buffers: dict[tuple, Any] = {}
        self._pieces: dict[tuple, tuple[Tensor, ...]] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the memory under ``name`` in ``shape``; what it holds is undefined."""
        view = self._views.get((name, shape))
        if view is None:
            size, whole = math.prod(shape), self._whole.get(name)
            if whole is None or whole.numel() < size:
                whole = torch.empty(size, dtype=self.dtype, device=self.device)
                self._whole[name] = whole
            view = self._views[name, shape] = whole[:size].view(shape)
        return view

    def once(self, name: str, sizes: tuple[int, ...], make: Callable[[], Buffers]) -> Buffers:
        """Return what ``make`` returned the first time, for spans with as many chunks at each step.

        Views of memory are worth keeping: all spans of a pass but the last are of one shape.
        """
        buffers = self._buffers.get((name, sizes))
        if buffers is None:
            buffers = self._buffers[name, sizes] = make()
        return buffers

    def split(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Split memory of this object along its first axis; the views are cached."""
        # The views keep the memory alive, so that no other tensor can get its address.
        key = (x.data_ptr(), x.shape, x.stride(), sizes)
        pieces = self._pieces.get(key)
        if pieces is None:
            pieces = self._pieces[key] = x.split(sizes)
        return pieces


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower half of (b, 2 C, ...), each (b, C, ...)."""
    upper, lower = x.split(x.shape[1] // 2, dim=1)
    return upper, lower


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
