"""Where the past of a stack lies: the contract between a layer and whatever holds its states.

A mixer knows nothing of the cache that it is run with. It is handed a `Slot`, which keeps two kinds of
things under names of the mixer's own:

    tokens   one column for each token: keys and values; `Slot.append`
    states   tensors of fixed size, one for each row: a recurrent state, the inputs of a convolution;
             `Slot.state` and `Slot.set_state`

and a layer is handed a `Past`, which has a slot for each of its mixers and canon layers:

    transformers' caches    `hybrid.modeling.cache.CachePast`, in `model(...)` and `generate`
    the process before      `hybrid.modeling.context_parallel.Neighbours`, in training on slices of rows
    a server's pages        whoever serves the model; see below

Whoever writes another one needs no change of a mixer. What a mixer will keep is declared ahead by
`Mixer.states` and `Mixer.tokens` (of a `Canon` layer by `Canon.states`), under the same names, so that a
server can reserve memory. A `Past` whose attention function reads keys from pages of its own returns
from `append` what it was given: only the attention function needs the others then.

Shapes: B rows, T tokens of the present forward, S tokens with those before, N documents.
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
    """The past of one mixer (or canon layer) of one layer."""

    def append(
        self,
        *,
        window: int | None = None,
        lengths: torch.Tensor | None = None,
        **tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Add a column for each new token, and return the columns that the new tokens may see.

        Args:
            window: W: a token sees at most W tokens, itself included, and no more are kept than that
                takes; None keeps all. Always the same for one name.
            lengths: (B,), with a window only: how many of the new columns of each row hold tokens. What
                stands behind them is padding and takes no room. None for all of them.
            tokens: name -> (B, heads or 1, T, dim) of the new tokens. A name is appended to once in a
                forward.

        Returns:
            In the order of the arguments (B, heads or 1, S, dim).

            Without a window the new columns stand behind all earlier ones; in a static cache, empty
            columns follow. With a window the new columns are the last T, and the tokens before stand
            next to them, the latest one last, at least W - 1 of them if there were so many; what stands
            further left in a row that had fewer has no meaning.
        """
        ...

    def state(self, name: str) -> torch.Tensor | None:
        """The state (B or N, ...) after the last token, or None at the start.

        Without gradients this is the slot's own memory, and the op that takes it may write the next
        state there.
        """
        ...

    def set_state(self, name: str, value: torch.Tensor) -> None:
        """Store the state (B or N, ...) after the last token of each row or document."""
        ...

    def begin(
        self, x: torch.Tensor, segments: Segments, run: Callable[[torch.Tensor], object]
    ) -> None:
        """Start a forward of a mixer that has states. Call it before any other method.

        In a cache that takes tokens back (`Cache.crop`, in speculative decoding) the states are brought
        in line with the tokens that are left: those that are left of the last forward are run again from
        where the states still are known.

        Args:
            x: the mixer's input, (B, T, D), before packing.
            segments: its padding.
            run: runs the mixer on inputs (B, t, D) for what it does to this slot.

        Raises:
            ValueError: a padded batch of several rows is to be recorded.
        """
        ...


class Past(ABC):
    """The past of every layer, in one forward of a stack."""

    @abstractmethod
    def slot(self, layer_idx: int, slot_idx: int) -> Slot | None:
        """The slot of a mixer or canon layer; None where nothing is to be remembered.

        Args:
            layer_idx: the layer, from 0.
            slot_idx: counts from 0 the mixers of the layer, in order, then its canon layers.
        """

    def tie(self, x: torch.Tensor) -> torch.Tensor:
        """The output x (B, T, D) of a layer, tied in autograd to what the layer sent and received."""
        return x


@dataclass(frozen=True)
class StateSpec:
    """A state that a mixer keeps.

    Attributes:
        shape: without the rows.
        dtype: None for that of the model.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def elements(self) -> int:
        """Of one row."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TokenSpec:
    """What a mixer keeps of each token.

    Attributes:
        heads, dim: of (B, heads, S, dim).
        window: W; None for all tokens.
        dtype: None for that of the model.
    """

    heads: int
    dim: int
    window: int | None = None
    dtype: torch.dtype | None = None

    @property
    def elements(self) -> int:
        """Of one token of one row."""
        return self.heads * self.dim
