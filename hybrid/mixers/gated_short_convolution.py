"""Gated short convolution: the mixer of LFM2, whose only state is that of the convolution.

Shapes: B batch, T time, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrid.config.declare import Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.base import MixerOptions, StateMixer
from hybrid.mixers.short_convolution import ShortConvolution
from hybrid.nn.past import Slot, StateSpec


@dataclass(frozen=True)
class GatedShortConvolutionOptions(MixerOptions):
    """Options of ``gated_short_convolution``.

    Attributes:
        conv_size: W, width of the convolution.
        bias: add biases to the projections and the convolution.
    """

    conv_size: Size2 = 3
    bias: bool = False


@register_mixer("gated_short_convolution", symbol="C")
class GatedShortConvolution(StateMixer):
    """Gated short convolution mixer (LFM2, arXiv 2511.23404, section 2).

    y = (C * conv(B * u)) W_o with [B, C, u] = x W_in: a depthwise convolution between two gates, as in
    Hyena (arXiv 2302.10866).
    """

    Options = GatedShortConvolutionOptions
    paper = "LFM2 arXiv 2511.23404"
    formula = "no decay: y_t = C_t * sum_w a_w (B u)_{t-w}, w < W"
    used_by = "LFM2"

    def __init__(self, options: GatedShortConvolutionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        d_model = sizes.hidden_size
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=options.bias)
        self.conv = ShortConvolution(d_model, options.conv_size, options.bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=options.bias)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the options of LFM2; and a wider convolution with biases."""
        return [{}, {"conv_size": 5, "bias": True}]

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        B, C, u = self.in_proj(x).chunk(3, dim=-1)
        return self.o_proj(C * self.conv(B * u, cu_seqlens, cache))

    def mixing_flops(self, context: int) -> float:
        """Count the two gates."""
        return 2.0 * self.sizes.hidden_size

    def states(self) -> dict[str, StateSpec]:
        """Return the last W - 1 inputs of the convolution."""
        return self.conv.states()
