"""RG-LRU: a gated diagonal recurrence (Griffin, arXiv 2402.19427; RecurrentGemma, arXiv 2404.07839).

Shapes: B batch, T time, N documents, E width of the recurrence, H blocks of the gates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.declare import Size, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.base import MixerOptions, StateMixer
from hybrid.mixers.parts import divides, to_float32, too_wide
from hybrid.mixers.short_convolution import ShortConvolution
from hybrid.nn.past import Slot, StateSpec
from hybrid_kernels import linear_attention

RATE = 8.0  # c in a_t = a^(c r_t)


@dataclass(frozen=True)
class RGLRUOptions(MixerOptions):
    """Options of ``rg_lru``.

    Attributes:
        width: E, channels of the recurrence; default D.
        num_heads: H, blocks of the block-diagonal gates; default E / 256, at least 1; must divide E.
        conv_size: width of the short convolution before the recurrence; null for no convolution.
    """

    width: Size | None = None
    num_heads: Size | None = None
    conv_size: Size2 | None = 4

    def complete(self, hidden_size: int) -> RGLRUOptions:
        """Return these options with the width and the blocks filled in."""
        width = hidden_size if self.width is None else self.width
        heads = max(1, width // 256) if self.num_heads is None else self.num_heads
        return replace(self, width=width, num_heads=heads)

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes."""
        done = self.complete(sizes.hidden_size)
        assert done.width is not None
        assert done.num_heads is not None
        lines = divides("num_heads", done.num_heads, "width", done.width)
        return lines or too_wide(**{"width / num_heads": done.width // done.num_heads})


class BlockDiagonal(nn.Module):
    """Block-diagonal linear map of x (B, T, E), with one matrix for each of H blocks of channels."""

    def __init__(self, blocks: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, size, size))
        self.bias = nn.Parameter(torch.empty(blocks, size))

    def init_parameters(self, std: float) -> None:
        """Draw weights from a normal distribution with variance 1 / block size; set the bias to 0."""
        init.normal_(self.weight, mean=0.0, std=self.weight.shape[-1] ** -0.5)
        init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, T, E) to (B, T, E)."""
        x = x.unflatten(-1, (self.weight.shape[0], -1))
        return (torch.einsum("bthi,hij->bthj", x, self.weight) + self.bias).flatten(-2)


@register_mixer("rg_lru", symbol="U")
class RGLRU(StateMixer):
    """RG-LRU mixer (arXiv 2402.19427, eq. 1 to 4 and section 2.3).

    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * u_t), log a_t = -8 r_t softplus(Lambda).

    u = conv(x W_u); r_t and i_t are sigmoids of block-diagonal maps of u_t. The output is
    (h * gelu(x W_y)) W_o. As in RecurrentGemma, the factor sqrt(1 - a_t^2) is left out if the state is
    empty. A block of channels is a head of the op with K = 1 and a decay over values.
    """

    Options = RGLRUOptions
    paper = "arXiv 2402.19427; RecurrentGemma arXiv 2404.07839"
    formula = "diagonal: h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * u_t), a_t = a^(8 r_t)"
    used_by = "RecurrentGemma, Griffin"

    def __init__(self, options: RGLRUOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        width, heads = options.width, options.num_heads
        assert width is not None
        assert heads is not None
        self.width, self.num_heads = width, heads
        self.x_proj = nn.Linear(sizes.hidden_size, width)
        self.gate_proj = nn.Linear(sizes.hidden_size, width)
        self.conv = None
        if options.conv_size:
            self.conv = ShortConvolution(width, options.conv_size, bias=True)
        self.input_gate = BlockDiagonal(heads, width // heads)
        self.recurrence_gate = BlockDiagonal(heads, width // heads)
        self.decay_rate = nn.Parameter(torch.empty(width))
        self.o_proj = nn.Linear(width, sizes.hidden_size, bias=True)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the options of RecurrentGemma; and another width without convolution."""
        return [{"num_heads": 2}, {"width": 24, "num_heads": 3, "conv_size": None}]

    def init_parameters(self, std: float) -> None:
        """Draw a^2 uniformly from [0.9^2, 0.999^2] (section 2.4), where a = exp(-softplus(Lambda))."""
        square = torch.empty_like(self.decay_rate, dtype=torch.float32)
        rate = -0.5 * square.uniform_(0.9**2, 0.999**2).log_()
        init.copy_(self.decay_rate, rate.expm1().log())

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        u = self.x_proj(x)
        if self.conv is not None:
            u = self.conv(u, cu_seqlens, cache)
        state = None if cache is None else cache.state("recurrent")
        r = torch.sigmoid(to_float32(self.recurrence_gate(u)))
        log_a = -RATE * r * F.softplus(to_float32(self.decay_rate))
        # 1 - a^2 without cancellation; the clamp keeps 0 * inf out of the gradient where a is 1
        left = (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(log_a.dtype).tiny).sqrt()
        left = torch.where(_meets_empty_state(u, state, cu_seqlens), 1.0, left)
        v = to_float32(u) * torch.sigmoid(to_float32(self.input_gate(u))) * left
        ones = v.new_ones(()).expand(*v.shape[:2], 1, 1)
        h, state = linear_attention(
            ones,
            ones,
            v.unflatten(-1, (self.num_heads, -1)),
            value_log_decay=log_a.unflatten(-1, (self.num_heads, -1)),
            scale=1.0,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            output_final_state=cache is not None,
        )
        if cache is not None and state is not None:
            cache.set_state("recurrent", state)
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        return self.o_proj(h.flatten(-2).to(x.dtype) * gate)

    def mixing_flops(self, context: int) -> float:
        """Count the block-diagonal gates, and 12 operations per channel."""
        return 2.0 * 2.0 * self.input_gate.weight.numel() + 12.0 * self.width

    def states(self) -> dict[str, StateSpec]:
        """Return E numbers of the recurrence, and the last W - 1 inputs of the convolution."""
        shape = (self.num_heads, 1, self.width // self.num_heads)
        conv = self.conv.states() if self.conv is not None else {}
        return {"recurrent": StateSpec(shape, torch.float32), **conv}


def _meets_empty_state(
    u: torch.Tensor, state: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Mark (B, T, 1) the first token of each document whose state (N, H, 1, V) is all zeros."""
    batch, time, _ = u.shape
    documents = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    empty = torch.ones(documents, dtype=torch.bool, device=u.device)
    if state is not None:
        empty = state.flatten(1).eq(0).all(dim=1)
    first = torch.zeros(batch, time, dtype=torch.bool, device=u.device)
    if cu_seqlens is None:
        return torch.cat([empty[:, None], first[:, 1:]], dim=1)[:, :time, None]
    bounds = cu_seqlens.long()
    # empty documents point past the end, to a column that is dropped
    place = torch.where(bounds[1:] > bounds[:-1], bounds[:-1], time)
    padded = torch.cat([first, first.new_zeros(batch, 1)], dim=1)
    return padded.index_copy(1, place, empty[None])[:, :time, None]
