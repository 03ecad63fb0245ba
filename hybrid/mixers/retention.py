"""Retention: a fixed decay per head and rotary positions (RetNet, arXiv 2307.08621)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.declare import Positive, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.linear_mixer import LinearMixer
from hybrid.mixers.parts import HeadOptions
from hybrid.mixers.rotation import positioned, rope_angles
from hybrid.nn.norms import build_norm
from hybrid.nn.past import Slot
from hybrid.nn.precision import Float32Buffers


@dataclass(frozen=True)
class RetentionOptions(HeadOptions):
    """Options of ``retention``.

    Attributes:
        num_heads: H; default D / 128, at least 1.
        head_dim: key dim K, even if there are positions; default V / 2, or D / H.
        value_head_dim: value dim V; default 2 K, or 2 D / H.
        rope_theta: base of the rotary positions; null for no positions.
        output_norm_weight: add a weight to the norm of the output, one for all heads.
        conv_size: width of a short convolution on q, k, v; null for no convolution, as in the paper.
    """

    rope_theta: Positive | None = 10000.0
    output_norm_weight: bool = False
    conv_size: Size2 | None = None

    width = 128
    value_share = 2.0

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes."""
        lines = super().problems(sizes)
        head_dim = self.complete(sizes.hidden_size).head_dim
        if not lines and self.rope_theta is not None and head_dim is not None and head_dim % 2:
            lines.append(
                f"head_dim: expected an even number, to be rotated, got {head_dim}; try {head_dim + 1}"
                " or rope_theta: null"
            )
        return lines


class RotatedLinearMixer(Float32Buffers, LinearMixer):
    """Linear mixer with rotary positions, whose output is normalised per head and gated by SiLU.

    The cache does not store a position: the rotation by theta per step is part of the decay, and the
    state is relative to the last token (see ``hybrid.mixers.rotation``).
    """

    float32_buffers = ("theta",)

    def __init__(self, options: Any, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.scale = key_dim**-0.5
        self.build(heads, key_dim, value_dim, options.conv_size, conv_activation="silu")
        self.gate_proj = nn.Linear(sizes.hidden_size, heads * value_dim, bias=False)
        kind = "rmsnorm" if options.output_norm_weight else "weightless_rmsnorm"
        self.norm = build_norm(kind, value_dim, sizes.norm_eps)
        self.theta = nn.Buffer(self._theta(), persistent=False)

    def _theta(self) -> torch.Tensor:
        return rope_angles(self.options.rope_theta, self.key_dim)

    def init_parameters(self, std: float) -> None:
        """Compute the angles, which are a function of the config and not a weight."""
        init.copy_(self.theta, self._theta())

    def recur(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        cache: Slot | None,
        carry: Any = None,
        **gates: Any,
    ) -> torch.Tensor:
        """Run the recurrence with q and k rotated: o (B, T, H, V)."""
        if not self.theta.numel():
            return super().recur(q, k, v, cu_seqlens, cache, carry, **gates)
        q, k, carry = positioned(q, k, self.theta, cu_seqlens)
        return super().recur(q, k, v, cu_seqlens, cache, carry=carry, **gates)

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return RMSNorm(o) per head times silu(x W_g), (B, T, H * V)."""
        return self.norm(o).flatten(-2) * F.silu(self.gate_proj(x))


@register_mixer("retention", symbol="T")
class Retention(RotatedLinearMixer):
    """Retention mixer (RetNet, arXiv 2307.08621, eq. 6 to 8).

    S_t = gamma_h e^{i theta} S_{t-1} + k_t v_t^T, gamma_h = 1 - 2^(-5 - h), h from 0.
    o_t = q_t^T S_t / sqrt(K), normalised per head and gated. Rotated pairs are (j, j + K/2). The
    published code uses (2j, 2j + 1), which is the same up to a permutation of columns.
    """

    Options = RetentionOptions
    paper = "arXiv 2307.08621"
    formula = "G_t = gamma_h e^{i theta} 1^T 1, gamma_h = 1 - 2^(-5-h) fixed per head"
    used_by = "RetNet"
    float32_buffers = ("theta", "log_decay")

    def __init__(self, options: RetentionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        self.log_decay = nn.Buffer(self._log_decay(), persistent=False)

    def _log_decay(self) -> torch.Tensor:
        heads = torch.arange(self.num_heads, dtype=torch.float32)
        return torch.log1p(-torch.exp2(-5.0 - heads))

    def init_parameters(self, std: float) -> None:
        """Compute angles and decays, which are functions of the config."""
        super().init_parameters(std)
        init.copy_(self.log_decay, self._log_decay())

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the options of the paper; and odd dims with a convolution, without positions."""
        return [
            {"num_heads": 2},
            {
                "num_heads": 3,
                "head_dim": 5,
                "value_head_dim": 7,
                "rope_theta": None,
                "conv_size": 3,
                "output_norm_weight": True,
            },
        ]

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return the fixed log decay, (H,)."""
        return {"log_decay": self.log_decay}
