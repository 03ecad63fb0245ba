"""Memory that the segments of one pass use in turn."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Named stretches of memory that every segment of a pass fills again.

    Fresh memory would be mapped, and page by page cleared, over and over; this stays in the cache.
    Whoever takes a name again overwrites what was under it.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._whole: dict[str, Tensor] = {}
        self._views: dict[tuple, Tensor] = {}
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

    def split(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Cut memory along its first axis; memory that stays, such as is taken here, but once."""
        # The pieces keep the memory alive, so that no other tensor can come to lie at its address.
        key = (x.data_ptr(), x.shape, x.stride(), sizes)
        pieces = self._pieces.get(key)
        if pieces is None:
            pieces = self._pieces[key] = x.split(sizes)
        return pieces
