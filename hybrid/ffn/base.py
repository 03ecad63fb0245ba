"""Base classes of feed-forwards: x (B, T, D) -> (B, T, D), applied to each token separately."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hybrid.config.parallel import Split
from hybrid.config.sizes import Sizes


@dataclass(frozen=True)
class FeedForwardOptions:
    """Base class of the options of all feed-forwards."""

    def complete(self, hidden_size: int) -> FeedForwardOptions:
        """Return these options with all defaults that depend on the model dim D filled in."""
        return self

    def problems(self, sizes: Sizes) -> list[str]:
        """Return the mistakes in the completed options, one line each."""
        return []


class FeedForward(nn.Module, ABC):
    """Base class of feed-forwards; ``register_feed_forward`` sets ``name`` and ``symbol``."""

    name: ClassVar[str]
    symbol: ClassVar[str | None]
    Options: ClassVar[type[FeedForwardOptions]] = FeedForwardOptions
    takes_canon: ClassVar[bool] = False
    """Whether ``forward`` has the argument ``convolve`` and the class has ``hidden_channels``."""
    residual_projections: ClassVar[tuple[str, ...]] = ("down_proj",)
    """Names of its Linear modules that write to the residual stream; ``init`` scales their weights."""
    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""

    def __init__(self, options: Any, sizes: Sizes, layer_idx: int) -> None:
        super().__init__()
        self.options = options
        self.sizes = sizes
        self.layer_idx = layer_idx

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, T, D) to (B, T, D)."""

    @classmethod
    def tensor_splits(cls, options: Any) -> tuple[Split, ...]:
        """Return how tensor parallelism may split the module; empty: every process has all of it."""
        return ()

    @classmethod
    def expert_splits(cls, options: Any) -> tuple[Split, ...]:
        """Return how expert parallelism may split the module by experts; empty without experts."""
        return ()

    def init_parameters(self, std: float) -> None:
        """Initialise the parameters of this module. Linear modules are initialised already."""

    def active_share(self) -> float:
        """Return the share of this module's parameters that one token uses."""
        return 1.0
