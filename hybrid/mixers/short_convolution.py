"""Short causal convolution, which many mixers apply before their recurrence."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.nn.past import Slot, StateSpec
from hybrid_kernels import causal_conv1d, split


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, x (B, T, D) -> (B, T, D).

    Supports a state and document boundaries. Mamba (arXiv 2312.00752) and DeltaNet (arXiv 2406.06484)
    apply it before the recurrence.
    """

    def __init__(
        self, channels: int, width: int, bias: bool = False, activation: str | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.activation = activation
        self.residual = False
        """Whether to add x to its convolution before the activation (canon layers)."""

    def init_parameters(self, std: float) -> None:
        """Initialise uniformly with variance 1 / (3 W), as torch's depthwise Conv1d; bias 0."""
        bound = self.weight.shape[1] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Convolve packed x, and continue from and write to the cache slot if there is one."""
        y, tail = causal_conv1d(
            x,
            self.weight.to(x.dtype),
            None if self.bias is None else self.bias.to(x.dtype),
            activation=None if self.residual else self.activation,
            initial_state=None if cache is None else cache.state("conv"),
            cu_seqlens=cu_seqlens,
            output_final_state=cache is not None,
        )
        if cache is not None and tail is not None:
            cache.set_state("conv", tail)
        if not self.residual:
            return y
        return F.silu(x + y) if self.activation == "silu" else x + y

    def split(
        self, parts: list[torch.Tensor], cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> tuple[torch.Tensor, ...]:
        """Convolve several tensors (B, T, ...), whose channels add up to D, in one call."""
        y = self(torch.cat(parts, dim=-1), cu_seqlens, cache)
        return split(y, [part.shape[-1] for part in parts])

    def states(self) -> dict[str, StateSpec]:
        """Return the shape (D, W - 1) of the last W - 1 inputs, under the name used by ``forward``."""
        channels, width = self.weight.shape
        return {"conv": StateSpec((channels, width - 1))}
