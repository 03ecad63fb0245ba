"""Decaying fast weights: decay by an outer product over keys and values (DFW, arXiv 2210.04243)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.config.declare import Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.linear_mixer import LinearMixer, OutputNorm
from hybrid.mixers.parts import HeadOptions, to_float32


@dataclass(frozen=True)
class DecayingFastWeightsOptions(HeadOptions):
    """Options of ``dfw``.

    Attributes:
        num_heads: H; default D / 64, at least 1.
        head_dim: key dim K; default V, or D / H.
        value_head_dim: value dim V; default K.
        conv_size: width of a short convolution on q, k, v; null for no convolution, as in the paper.
        output_norm: RMSNorm of the output over all heads (``layer``) or over each head (``head``); null
            for no norm, as in the paper, which starts from trained weights.
        bias: add biases to q, k, v and the output projection.
    """

    conv_size: Size2 | None = None
    output_norm: Literal["layer", "head"] | None = None
    bias: bool = False


@register_mixer("dfw", symbol="F")
class DecayingFastWeights(LinearMixer):
    """Decaying fast weights mixer (arXiv 2210.04243, section 4).

    S_t = (alpha_t beta_t^T) * S_{t-1} + k_t v_t^T, o_t = q_t^T S_t.

    alpha_t (K,) and beta_t (V,) are sigmoids of linear maps of x. There is no feature map and no
    denominator.
    """

    Options = DecayingFastWeightsOptions
    paper = "arXiv 2210.04243"
    formula = "G_t = alpha_t^T beta_t, both sigmoids of linear maps of x_t"
    used_by = "converted GPT-2 of its paper"

    def __init__(self, options: DecayingFastWeightsOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.build(heads, key_dim, value_dim, options.conv_size, options.bias)
        self.key_decay_proj = nn.Linear(sizes.hidden_size, heads * key_dim)
        self.value_decay_proj = nn.Linear(sizes.hidden_size, heads * value_dim)
        self.norm = None
        if options.output_norm:
            self.norm = OutputNorm(options.output_norm, heads, value_dim, sizes.norm_eps)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the options of the paper; and unequal dims with a convolution and a norm."""
        return [
            {"num_heads": 2},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, "conv_size": 4,
             "output_norm": "head", "bias": True},
        ]  # fmt: skip

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return log alpha (B, T, H, K) and log beta (B, T, H, V)."""
        alpha, beta = (
            F.logsigmoid(to_float32(proj(x))).unflatten(-1, (self.num_heads, -1))
            for proj in (self.key_decay_proj, self.value_decay_proj)
        )
        return {"log_decay": alpha, "value_log_decay": beta}

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Flatten o (B, T, H, V) to (B, T, H * V), normalised if ``output_norm`` is set."""
        return o.flatten(-2) if self.norm is None else self.norm(o)
