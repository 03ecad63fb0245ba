"""Where the past of a stack lies: the contract between a layer and whatever holds its states.

`generate` keeps the past in a cache of transformers (`hybrid.nn.cache.LayerCache` is a slot of one). A
caller that keeps it elsewhere (on another process, in the pages of a server) hands the stack a `Past`,
and each mixer and each canon layer reads and writes its own `Slot`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch

from hybrid.nn.packing import Segments


class Slot(Protocol):
    """The past of one mixer or canon layer.

    Shapes: N is the number of documents in a packed row, and otherwise of rows.
    """

    def update_kv(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, H_kv, T, dim); returns all that the attention function gets."""
        ...

    def recurrent_state(self) -> torch.Tensor | None:
        """The states (N, ...) to continue from; None where every document begins here."""
        ...

    def set_recurrent_state(self, state: torch.Tensor) -> None:
        """Store the states (N, ...) after the last token of each document."""
        ...

    def conv_state(self) -> torch.Tensor | None:
        """The last W - 1 inputs of the convolution (N, D, W - 1); None where every document begins."""
        ...

    def set_conv_state(self, state: torch.Tensor) -> None:
        """Store the last W - 1 inputs of the convolution of each document."""
        ...

    def resume(
        self, x: torch.Tensor, segments: Segments, run: Callable[[torch.Tensor], object]
    ) -> None:
        """Called before each forward with the mixer's input, for slots that can be rolled back."""
        ...


class Past(ABC):
    """The past of every layer of a stack, where it is not a cache of transformers."""

    @abstractmethod
    def slot(self, layer_idx: int, state_idx: int) -> Slot:
        """The slot of a layer's mixer or canon layer.

        Args:
            layer_idx: the layer, from 0.
            state_idx: counts from 0 the mixers of the layer that have a state, in order, then its
                canon layers. A mixer without a state has the number of the next that has one.
        """

    def tie(self, x: torch.Tensor) -> torch.Tensor:
        """The output (B, T, D) of a layer, tied in autograd to what the layer sent and received."""
        return x
