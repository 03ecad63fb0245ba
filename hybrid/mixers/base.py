"""Base classes of token mixers.

Shapes: B batch, T time, D model dim.

A mixer is one class in one file. It maps x (B, T, D) to y (B, T, D). Only mixers exchange information
between tokens. ``Mixer`` is the interface that the model relies on, ``StateMixer`` the base class of
those with a state. See ``hybrid.mixers.linear_mixer`` for linear attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hybrid.config.parallel import Split
from hybrid.config.sizes import Sizes
from hybrid.nn.arguments import MIXER_ARGUMENTS, check_arguments
from hybrid.nn.packing import WHOLE_ROWS, Segments
from hybrid.nn.past import Slot, StateSpec, TokenSpec


@dataclass(frozen=True)
class MixerOptions:
    """Base class of the options of all mixers."""

    def complete(self, hidden_size: int) -> MixerOptions:
        """Return these options with all defaults that depend on the model dim D filled in."""
        return self

    def scaled_from(self, base: Any) -> MixerOptions:
        """Return these options under muP; ``base`` are those of the same mixer at the base width."""
        return self

    def problems(self, sizes: Sizes) -> list[str]:
        """Return the mistakes in the completed options, one line each ('num_heads: ...')."""
        return []


class Mixer(nn.Module, ABC):
    """Base class of token mixers.

    Class attributes:
        name, symbol: set by ``register_mixer``.
        Options: the options dataclass.
        layer_type: transformers' name of the required mask: ``full_attention`` (keys and values are
            cached) or ``linear_attention`` (only states are cached).
        attends: "full" or "local" (window, chunk) for softmax over the keys of earlier tokens; "" for a
            state. ``hybrid_eval`` selects the branches to knock out by this value; None: by
            ``layer_type``.
        paper: paper of the mixer.
        formula: one line, in the notation S_t = G_t * S_{t-1} + v_t k_t^T.
        used_by: published models that use the mixer.
        kind: name of the first registered class among the bases. Mixers of one kind are counted
            together (``Sizes.kind_idx``).
        shared_by_stack: names of parameters shared by all layers of the mixer in a stack.
        residual_projections: names of its Linear modules that write to the residual stream; ``init``
            scales their weights.
        continues_packed: whether packed documents can continue from a cache.
    """

    name: ClassVar[str]
    symbol: ClassVar[str | None]
    kind: ClassVar[str]
    Options: ClassVar[type[MixerOptions]] = MixerOptions
    layer_type: ClassVar[str] = "linear_attention"
    attends: ClassVar[str | None] = None
    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    used_by: ClassVar[str] = ""
    shared_by_stack: ClassVar[tuple[str, ...]] = ()
    residual_projections: ClassVar[tuple[str, ...]] = ("o_proj",)
    continues_packed: ClassVar[bool] = True

    def __init__(self, options: Any, sizes: Sizes, layer_idx: int) -> None:
        super().__init__()
        self.options = options
        self.sizes = sizes
        self.layer_idx = layer_idx

    @abstractmethod
    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        segments: Segments = WHOLE_ROWS,
        cache: Slot | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix the tokens of x.

        Args:
            x: (B, T, D).
            attention_mask: mask of ``layer_type`` as returned by transformers' mask functions.
            position_embeddings: (cos, sin) of the layer's rotary embedding, or None.
            segments: document boundaries and padding, for mixers with a state.
            cache: cache slot to continue from and to write to, or None.

        Returns:
            (y, weights): y (B, T, D); weights (B, H, T, T_total) if the mixer has attention weights and
            the attention implementation returns them, else None.
        """

    def check_arguments(self, kwargs: dict[str, Any]) -> None:
        """Raise TypeError for keyword arguments of ``forward`` that no mixer accepts."""
        known = MIXER_ARGUMENTS | {"attention_mask", "position_embeddings"}
        check_arguments(type(self).__name__, Mixer.forward, kwargs, known)

    @classmethod
    def uses_state(cls, options: Any) -> bool:
        """Return whether the cache holds a recurrent or convolution state of the mixer."""
        return cls.layer_type == "linear_attention"

    @classmethod
    def fits_paged(cls, options: Any) -> bool:
        """Return whether paged caches fit: only keys and values are cached, and of equal size."""
        return False

    @classmethod
    def tensor_splits(cls, options: Any) -> tuple[Split, ...]:
        """Return how tensor parallelism may split the mixer; empty: every process has all of it."""
        return ()

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return sets of options for the tests, small enough for D = 32.

        Every invariant test runs on each set. List one set per branch of the code.
        """
        return [{"num_heads": 2}]

    @classmethod
    def rotary(cls, options: Any, sizes: Sizes) -> nn.Module | None:
        """Return the rotary embedding for these options, shared per symbol; None for none."""
        return None

    def init_parameters(self, std: float) -> None:
        """Initialise parameters and buffers of this module. Linear modules are initialised already."""

    def mixing_flops(self, context: int) -> float:
        """Return forward FLOPs per token without projections, as a mean over ``context`` tokens."""
        return 0.0

    def tokens(self) -> dict[str, TokenSpec]:
        """Return the per-token entries that ``forward`` appends to its cache slot, by name."""
        return {}

    def states(self) -> dict[str, StateSpec]:
        """Return the states that ``forward`` keeps in its cache slot, by name."""
        return {}


class StateMixer(Mixer):
    """Mixer that keeps a state in place of keys and values, and sees documents one after the other.

    Subclasses implement ``mix``. Its input has no padding: the real tokens are packed.
    """

    layer_type = "linear_attention"
    attends = ""

    def forward(
        self,
        x: torch.Tensor,
        *,
        segments: Segments = WHOLE_ROWS,
        cache: Slot | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """See ``Mixer.forward``. The mask is not used; ``segments`` describes the padding."""
        self.check_arguments(kwargs)
        batch, time, _ = x.shape
        if cache is not None:
            cache.begin(x, segments, lambda again: self.mix(again, None, cache))
        y = self.mix(segments.pack(x), segments.cu_seqlens, cache)
        return segments.unpack(y, batch, time), None

    @abstractmethod
    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D), or (1, tokens, D) with ``cu_seqlens``, to y of the same shape."""


def head_problems(hidden_size: int, num_heads: int) -> list[str]:
    """Return an error line if the heads do not divide D and no option sets the head dim."""
    if hidden_size % num_heads == 0:
        return []
    near = nearest_divisors(hidden_size, num_heads)
    return [
        f"num_heads: expected a divisor of hidden_size {hidden_size}, got {num_heads}; try {near}, or"
        " set head_dim"
    ]


def nearest_divisors(number: int, wanted: int) -> str:
    """Return the divisors of ``number`` next to ``wanted``, as text: '8 or 16'."""
    below = max((d for d in range(1, min(wanted, number) + 1) if number % d == 0), default=None)
    above = next((d for d in range(wanted + 1, number + 1) if number % d == 0), None)
    return " or ".join(str(d) for d in (below, above) if d is not None)
