"""Gated linear attention: a low-rank decay per key channel (GLA, arXiv 2312.06635)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.mixers.base import LinearMixer
from hybrid.mixers.parts import GatedRMSNorm, HeadOptions, low_rank, positive, wide
from hybrid.registry import register_mixer

if TYPE_CHECKING:
    from hybrid.config import HybridConfig


@dataclass(frozen=True)
class GatedLinearAttentionOptions(HeadOptions):
    """Options of `gated_linear_attention`.

    Attributes:
        num_heads: H; default D / 256, at least 1.
        head_dim: key dim K; default V / 2, or D / 2H.
        value_head_dim: value dim V; default 2 K, or D / H.
        gate_rank: rank of the map from x to the decay.
        tau: temperature: the decay is sigmoid(.)^(1 / tau), closer to 1 the larger it is.
        conv_size: width of a short convolution on q, k, v; null for none, as in the paper.
    """

    gate_rank: int = 16
    tau: float = 16.0
    conv_size: int | None = None

    width = 256
    key_share = 0.5

    def problems(self, config: HybridConfig) -> list[str]:
        """Sizes that do not fit together."""
        return super().problems(config) + positive(gate_rank=self.gate_rank, tau=self.tau)


@register_mixer("gated_linear_attention", symbol="G")
class GatedLinearAttention(LinearMixer):
    """S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, alpha_t = sigmoid(x W_1 W_2 + b)^(1 / tau).

    Output RMSNorm(q_t^T S_t / sqrt(K)) * silu(x W_r + b_r) per head (arXiv 2312.06635, section 4.4).
    """

    Options = GatedLinearAttentionOptions
    paper = "arXiv 2312.06635"
    formula = "G_t = alpha_t^T 1, alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/tau)"
    used_by = "GLA"

    def __init__(
        self, options: GatedLinearAttentionOptions, config: HybridConfig, layer_idx: int
    ) -> None:
        super().__init__(options, config, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.scale = key_dim**-0.5
        self.build(heads, key_dim, value_dim, options.conv_size, conv_activation="silu")
        self.decay_proj = low_rank(
            config.hidden_size, options.gate_rank, heads * key_dim, bias=True
        )
        self.gate_proj = nn.Linear(config.hidden_size, heads * value_dim)
        self.norm = GatedRMSNorm(value_dim, config.norm_eps)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """As the paper has it; a convolution and another temperature."""
        return [
            {"num_heads": 2, "gate_rank": 4},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, "conv_size": 4, "tau": 2.0},
        ]

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """log alpha (B, T, H, K)."""
        f = wide(self.decay_proj(x)).unflatten(-1, (self.num_heads, -1))
        return {"log_decay": F.logsigmoid(f) / self.options.tau}

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm(o) * silu(x W_r + b_r)."""
        return self.norm(o, self.gate_proj(x))
