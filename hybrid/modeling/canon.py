"""Canon layers: short causal convolutions with a residual, all over a layer.

From "Physics of Language Models: Part 4.1" (Allen-Zhu, 2025), which names four positions:

    A  before the mixer, after its norm
    B  on q, k, v within the mixer
    C  before the feed-forward, after its norm
    D  within the feed-forward, on the gate and what it gates, before the activation

Each is x_t + sum_w a_w * x_{t-w}, w < W = 4, a depthwise convolution that costs about a thousandth of
the parameters. Shapes: B batch, T time, C channels.
"""

from __future__ import annotations

import torch

from hybrid.mixers.base import ShortConvolution
from hybrid.nn.packing import Segments
from hybrid.nn.past import Slot


class Canon(ShortConvolution):
    """x + convolution of x, on the whole batch, with padding and documents as `segments` has them."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width)
        self.residual = True

    def run(self, x: torch.Tensor, segments: Segments, cache: Slot | None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C), continuing from and writing to the cache slot where there is one."""
        if cache is not None:
            cache.begin(x, segments, lambda again: self(again, None, cache))
        y = self(segments.pack(x), segments.cu_seqlens, cache)
        return segments.unpack(y, *x.shape[:2])
