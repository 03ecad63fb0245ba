"""Dense feed-forwards: gated (SwiGLU, GeGLU) and plain (squared ReLU, GELU, ...)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.activations import ACT2FN

from hybrid.config.block_options import scaled
from hybrid.config.declare import Size
from hybrid.config.parallel import Split
from hybrid.config.registry import register_feed_forward
from hybrid.config.sizes import Sizes
from hybrid.ffn.base import FeedForward, FeedForwardOptions

# name -> (gated, activation by transformers' name)
ACTIVATIONS = {
    "swiglu": (True, "silu"),
    "geglu": (True, "gelu"),
    "geglu_tanh": (True, "gelu_pytorch_tanh"),
    "reglu": (True, "relu"),
    "relu2": (False, "relu2"),
    "gelu": (False, "gelu"),
    "silu": (False, "silu"),
}


@dataclass(frozen=True)
class DenseOptions(FeedForwardOptions):
    """Options of ``dense``.

    Attributes:
        intermediate_size: inner width; default 8 D / 3 for gated and 4 D for plain activations,
            rounded up to a multiple of 32.
        activation: ``swiglu``, ``geglu``, ``geglu_tanh`` and ``reglu`` are gated (arXiv
            2002.05202); ``relu2`` (arXiv 2109.08668), ``gelu`` and ``silu`` are plain.
        bias: add biases to the projections.
        gate_multiplier: factor of W_gate x, before its activation (first of ``mlp_multipliers`` of
            Falcon-H1, arXiv 2507.22448; the second is the residual's ``output_multiplier``).
    """

    intermediate_size: Size | None = None
    activation: Literal["swiglu", "geglu", "geglu_tanh", "reglu", "relu2", "gelu", "silu"] = (
        "swiglu"
    )
    bias: bool = False
    gate_multiplier: float = 1.0

    def complete(self, hidden_size: int) -> DenseOptions:
        """Return these options with the inner width filled in."""
        if self.intermediate_size is not None:
            return self
        gated, _ = ACTIVATIONS[self.activation]
        width = hidden_size * 8 / 3 if gated else hidden_size * 4
        return replace(self, intermediate_size=32 * -(-int(width) // 32))

    @property
    def width(self) -> int:
        """Inner width of completed options."""
        assert self.intermediate_size is not None
        return self.intermediate_size

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for a multiplier without a gate."""
        if self.gate_multiplier == 1 or ACTIVATIONS[self.activation][0]:
            return []
        return [
            f"gate_multiplier: expected 1, as activation {self.activation!r} has no gate to multiply,"
            f" got {self.gate_multiplier}; try a gated activation"
        ]


@register_feed_forward("dense", symbol="-")
class Dense(FeedForward):
    """Dense feed-forward (arXiv 2002.05202).

    W_down(act(W_gate x) * W_up x), or W_down act(W_up x) for plain activations.
    """

    Options = DenseOptions
    takes_canon = True
    paper = "arXiv 2002.05202"
    formula = "W_down(act(W_gate x) * W_up x)"

    def __init__(self, options: DenseOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        gated, activation = ACTIVATIONS[options.activation]
        d_model, inner = sizes.hidden_size, options.width
        self.gate_proj = nn.Linear(d_model, inner, bias=options.bias) if gated else None
        self.up_proj = nn.Linear(d_model, inner, bias=options.bias)
        self.down_proj = nn.Linear(inner, d_model, bias=options.bias)
        self.act = ACT2FN[activation]

    @classmethod
    def tensor_splits(cls, options: Any) -> tuple[Split, ...]:
        """Return a split by channels of the inner width."""
        rules = {"up_proj": "colwise", "down_proj": "rowwise"}
        if ACTIVATIONS[options.activation][0]:
            rules["gate_proj"] = "colwise"
        return (Split(rules, {"intermediate_size": options.width}),)

    @property
    def hidden_channels(self) -> int:
        """Channels of a canon layer within the feed-forward: I, or 2 I with a gate."""
        return self.options.width * (1 if self.gate_proj is None else 2)

    def forward(
        self, x: torch.Tensor, convolve: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Apply the feed-forward to each token.

        Args:
            x: (B, T, D).
            convolve: function applied to [gate, up] (B, T, ``hidden_channels``) before the
                activation, with the same output shape; None for none.

        Returns:
            (B, T, D).
        """
        up = self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(self.act(up if convolve is None else convolve(up)))
        gate = scaled(self.gate_proj(x), self.options.gate_multiplier)
        if convolve is not None:
            gate, up = convolve(torch.cat([gate, up], dim=-1)).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)
