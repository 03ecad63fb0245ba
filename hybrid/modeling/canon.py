"""Canon layers: short causal convolutions with a residual, at four positions of a layer.

"Physics of Language Models: Part 4.1" (Allen-Zhu, 2025) defines the positions:

    A  before the mixer, after its norm
    B  on q, k, v within the mixer
    C  before the feed-forward, after its norm
    D  within the feed-forward, on both inputs of the gated activation

Each is x_t + sum_w a_w * x_{t-w}, w < W = 4, a depthwise convolution with about 0.1% of the parameters.

Shapes: B batch, T time, C channels.
"""

from __future__ import annotations

import torch

from hybrid.mixers.short_convolution import ShortConvolution
from hybrid.nn.packing import Segments
from hybrid.nn.past import Slot


class Canon(ShortConvolution):
    """Canon layer x + conv(x), which respects the padding and document boundaries of a batch."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width)
        self.residual = True

    def run(self, x: torch.Tensor, segments: Segments, cache: Slot | None) -> torch.Tensor:
        """Map x (B, T, C) to (B, T, C); continue from and write to the cache slot if there is one."""
        if cache is not None:
            cache.begin(x, segments, lambda again: self(again, None, cache))
        y = self(segments.pack(x), segments.cu_seqlens, cache)
        return segments.unpack(y, *x.shape[:2])
