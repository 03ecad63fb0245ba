"""The feed-forward contract: x (B, T, D) -> (B, T, D), each token on its own."""

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
    """Base of every feed-forward's options dataclass."""

    def complete(self, hidden_size: int) -> FeedForwardOptions:
        """These options with every default that depends on the model dim D filled in."""
        return self

    def problems(self, sizes: Sizes) -> list[str]:
        """What is wrong with the completed options, a line each."""
        return []


class FeedForward(nn.Module, ABC):
    """One feed-forward of one layer; `name` and `symbol` are set by `register_feed_forward`."""

    name: ClassVar[str]
    symbol: ClassVar[str | None]
    Options: ClassVar[type[FeedForwardOptions]] = FeedForwardOptions
    takes_canon: ClassVar[bool] = False
    """Whether `forward` takes `convolve`, and there is `hidden_channels`, as `dense` has them."""
    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""

    def __init__(self, options: Any, sizes: Sizes, layer_idx: int) -> None:
        super().__init__()
        self.options = options
        self.sizes = sizes
        self.layer_idx = layer_idx

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""

    @classmethod
    def tensor_splits(cls, options: Any) -> tuple[Split, ...]:
        """How tensor parallelism may split it; empty: each process has the whole module."""
        return ()

    @classmethod
    def expert_splits(cls, options: Any) -> tuple[Split, ...]:
        """How expert parallelism may split it, by whole experts; empty without experts."""
        return ()

    def init_parameters(self, std: float) -> None:
        """Initialise parameters of this module itself; Linear layers are done already."""

    def active_share(self) -> float:
        """Share of this module's parameters that one token uses."""
        return 1.0
