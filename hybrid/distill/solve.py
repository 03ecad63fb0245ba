"""Solve output projections by least squares, without gradient descent.

A mixer's output is linear in its output projection. With the rest of the mixer fixed, the
projection that is closest to the teacher's output is the solution of the normal equations (ridge
regression).

Shapes: N tokens, I inner channels, D model dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

RIDGE = 1e-3
"""Ridge, relative to the mean of the diagonal: limits the weights of channels with little variance."""


class Equations:
    """The equations U^T U W = U^T Y, summed in float64: U (N, I) is the input of ``o_proj``, Y (N,
    D).
    """

    def __init__(self) -> None:
        self.left: torch.Tensor | None = None
        self.right: torch.Tensor | None = None
        self._read: torch.Tensor | None = None

    @contextmanager
    def reading(self, mixer: Any) -> Iterator[None]:
        """Record the inputs of a mixer's output projection."""

        def hook(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            self._read = args[0]

        handle = mixer.o_proj.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def add(self, wanted: torch.Tensor) -> None:
        """Add the recorded tokens, with their target outputs (B, T, D)."""
        assert self._read is not None
        read, wanted = self._read.flatten(0, 1).float(), wanted.flatten(0, 1).float()
        left, right = (read.T @ read).double(), (read.T @ wanted).double()
        self.left = left if self.left is None else self.left + left
        self.right = right if self.right is None else self.right + right

    def solve(self, mixer: Any) -> None:
        """Set the weight of the output projection; a bias becomes 0."""
        assert self.left is not None
        assert self.right is not None
        eye = torch.eye(len(self.left), dtype=self.left.dtype, device=self.left.device)
        ridge = RIDGE * self.left.diagonal().mean()
        mixer.o_proj.weight.copy_(torch.linalg.solve(self.left + ridge * eye, self.right).T)
        if mixer.o_proj.bias is not None:
            mixer.o_proj.bias.zero_()
