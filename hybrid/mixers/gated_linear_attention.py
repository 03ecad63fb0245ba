"""Gated linear attention: a low-rank decay per key channel (GLA, arXiv 2312.06635)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.config.declare import Negative, Positive, Size, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.linear_mixer import FEATURE_MAPS, LinearMixer
from hybrid.mixers.parts import GatedRMSNorm, HeadOptions, low_rank, to_float32


@dataclass(frozen=True)
class GatedLinearAttentionOptions(HeadOptions):
    """Options of ``gated_linear_attention``.

    Attributes:
        num_heads: H; default D / 256, at least 1.
        head_dim: key dim K; default V / 2, or D / 2H.
        value_head_dim: value dim V; default 2 K, or D / H.
        gate_rank: rank of the map from x to the decay.
        tau: temperature of the decay, sigmoid(.)^(1 / tau). A larger tau gives a decay closer to 1.
        min_log_decay: lower bound of the log decay; null for no bound.
        conv_size: width of a short convolution on q, k, v; null for no convolution, as in the paper.
        feature_map: feature map of q and k: ``identity``, ``silu`` or ``relu``.
        output_gate: gate the normalised output.
        gate_bias: add a bias to the output gate. Published checkpoints do not have one.
    """

    gate_rank: Size = 16
    tau: Positive = 16.0
    min_log_decay: Negative | None = None
    conv_size: Size2 | None = None
    feature_map: Literal["identity", "silu", "relu"] = "identity"
    output_gate: bool = True
    gate_bias: bool = True

    width = 256
    key_share = 0.5


@register_mixer("gated_linear_attention", symbol="G")
class GatedLinearAttention(LinearMixer):
    """Gated linear attention mixer (arXiv 2312.06635, section 4.4).

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, alpha_t = sigmoid(x W_1 W_2 + b)^(1 / tau). The output is
    RMSNorm(q_t^T S_t / sqrt(K)) * silu(x W_r + b_r) per head.
    """

    Options = GatedLinearAttentionOptions
    paper = "arXiv 2312.06635"
    formula = "G_t = alpha_t^T 1, alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/tau)"
    used_by = "GLA"

    def __init__(self, options: GatedLinearAttentionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.scale = key_dim**-0.5
        self.build(heads, key_dim, value_dim, options.conv_size, conv_activation="silu")
        self.decay_proj = low_rank(sizes.hidden_size, options.gate_rank, heads * key_dim, bias=True)
        self.gate_proj = None
        if options.output_gate:
            self.gate_proj = nn.Linear(sizes.hidden_size, heads * value_dim, bias=options.gate_bias)
        self.norm = GatedRMSNorm(value_dim, sizes.norm_eps)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the options of the paper, and sets for the other branches."""
        return [
            {"num_heads": 2, "gate_rank": 4},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, "conv_size": 4, "tau": 2.0},
            {"num_heads": 2, "gate_rank": 4, "min_log_decay": -0.1, "feature_map": "silu",
             "output_gate": False},
            {"num_heads": 1, "head_dim": 4, "value_head_dim": 258, "gate_bias": False},
        ]  # fmt: skip

    def features(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Apply the feature map to q and k."""
        feature_map = FEATURE_MAPS[self.options.feature_map]
        return feature_map(q), feature_map(k), v

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return log alpha (B, T, H, K)."""
        f = to_float32(self.decay_proj(x)).unflatten(-1, (self.num_heads, -1))
        log_decay = F.logsigmoid(f) / self.options.tau
        if self.options.min_log_decay is not None:
            log_decay = log_decay.clamp(min=self.options.min_log_decay)
        return {"log_decay": log_decay}

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return RMSNorm(o) * silu(x W_r + b_r), (B, T, H * V)."""
        return self.norm(o, None if self.gate_proj is None else self.gate_proj(x))
