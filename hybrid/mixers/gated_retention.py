"""Gated retention: RetNet with a data-dependent decay per head (YOCO, arXiv 2405.05254)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.config.declare import Positive
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.parts import to_float32
from hybrid.mixers.retention import RetentionOptions, RotatedLinearMixer


@dataclass(frozen=True)
class GatedRetentionOptions(RetentionOptions):
    """Options of ``gated_retention``, in addition to those of ``retention``.

    By default V = K = D / H.

    Attributes:
        tau: temperature of the decay, sigmoid(.)^(1 / tau). A larger tau gives a decay closer to 1.
    """

    tau: Positive = 16.0

    value_share = 1.0


@register_mixer("gated_retention", symbol="Y")
class GatedRetention(RotatedLinearMixer):
    """Gated retention mixer (YOCO, arXiv 2405.05254, eq. 5 to 7).

    S_t = gamma_t e^{i theta} S_{t-1} + k_t v_t^T, gamma_t = sigmoid(x W_gamma)^(1 / tau) per head.
    Rotary positions, norm and gate are those of RetNet.
    """

    Options = GatedRetentionOptions
    paper = "arXiv 2405.05254"
    formula = "G_t = gamma_t e^{i theta} 1^T 1, gamma_t = sigmoid(x_t W_gamma)^(1/tau)"
    used_by = "YOCO"

    def __init__(self, options: GatedRetentionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        self.decay_proj = nn.Linear(sizes.hidden_size, self.num_heads, bias=False)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the options of the paper; and unequal dims without positions."""
        return [
            {"num_heads": 2},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, "rope_theta": None, "tau": 2.0},
        ]

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return log gamma (B, T, H)."""
        return {"log_decay": F.logsigmoid(to_float32(self.decay_proj(x))) / self.options.tau}
