"""Interface between layers and the storage of earlier tokens: caches, other processes, servers.

A mixer does not depend on a particular cache. It receives a ``Slot``, which stores two kinds of entries
under names that the mixer chooses:

    tokens   one column per token, such as keys and values; ``Slot.append``
    states   tensors of fixed size per row, such as a recurrent state or the last inputs of a
             convolution; ``Slot.state`` and ``Slot.set_state``

A layer receives a ``Past``, which has one slot for each of its mixers and canon layers:

    transformers' caches    ``hybrid.modeling.cache.CachePast``, in ``model(...)`` and ``generate``
    the previous process    ``hybrid.modeling.context_parallel.Neighbours``, in context parallelism
    pages of a server       implemented by the server; see below

A new implementation needs no change of a mixer. ``Mixer.states`` and ``Mixer.tokens`` (``Canon.states``
for canon layers) declare the entries under the same names, so that a server can reserve memory. If the
attention function reads keys from pages, ``append`` may return its arguments unchanged.

Shapes: B rows, T tokens of the current forward, S tokens including earlier ones, N documents.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from hybrid.nn.packing import Segments


class Slot(Protocol):
    """Storage of one mixer (or canon layer) of one layer."""

    def append(
        self,
        *,
        window: int | None = None,
        lengths: torch.Tensor | None = None,
        **tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Add a column for each new token, and return the columns that the new tokens attend to.

        Args:
            window: W. A token attends to at most W tokens, including itself, and only these are kept;
                None keeps all tokens. Always use the same window for a name.
            lengths: (B,), only with a window: number of new columns with tokens in each row. The other
                new columns are padding and are not kept. None for all.
            tokens: name -> new tokens (B, heads or 1, T, dim). Append to a name once per forward.

        Returns:
            (B, heads or 1, S, dim) for each name, in the order of the arguments.

            Without a window, the new columns come after all earlier ones. In a static cache, empty
            columns follow. With a window, the new columns are the last T. The latest earlier tokens come
            directly before them, in order, at least W - 1 if there were as many. In rows with fewer,
            columns further left are undefined.
        """
        ...

    def state(self, name: str) -> torch.Tensor | None:
        """Return the state (B or N, ...) after the last token, or None at the start.

        Without gradients the result is the slot's own memory. The op may overwrite it with the next
        state.
        """
        ...

    def set_state(self, name: str, value: torch.Tensor) -> None:
        """Store the state (B or N, ...) after the last token of each row or document."""
        ...

    def begin(
        self, x: torch.Tensor, segments: Segments, run: Callable[[torch.Tensor], object]
    ) -> None:
        """Start a forward of a mixer with states. Call it before any other method.

        If tokens were removed from the cache (``Cache.crop``, in speculative decoding), the states are
        recomputed for the remaining tokens, from the last saved states.

        Args:
            x: input of the mixer, (B, T, D), before packing.
            segments: padding of x.
            run: function that runs the mixer on inputs (B, t, D) and updates this slot.

        Raises:
            ValueError: the cache records a padded batch of several rows.
        """
        ...


class Past(ABC):
    """Storage of all layers, in one forward of a stack."""

    @abstractmethod
    def slot(self, layer_idx: int, slot_idx: int) -> Slot | None:
        """Return the slot of a mixer or canon layer; None to store nothing.

        Args:
            layer_idx: index of the layer, from 0.
            slot_idx: index from 0 over the mixers of the layer, then its canon layers.
        """

    def tie(self, x: torch.Tensor) -> torch.Tensor:
        """Make a layer's output x (B, T, D) depend in autograd on all that it sent and received."""
        return x


@dataclass(frozen=True)
class StateSpec:
    """Shape and dtype of a state of a mixer.

    Attributes:
        shape: shape of one row.
        dtype: dtype; None for the model's.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def elements(self) -> int:
        """Number of elements per row."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TokenSpec:
    """Shape and dtype of the cached entry of each token of a mixer.

    Attributes:
        heads, dim: sizes of (B, heads, S, dim).
        window: W, number of tokens kept; None for all.
        dtype: dtype; None for the model's.
    """

    heads: int
    dim: int
    window: int | None = None
    dtype: torch.dtype | None = None

    @property
    def elements(self) -> int:
        """Number of elements per token and row."""
        return self.heads * self.dim
