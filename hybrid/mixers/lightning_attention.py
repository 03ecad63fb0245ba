"""Lightning attention: a fixed decay per head (arXiv 2401.04658; MiniMax-01, arXiv 2501.08313)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import initialization as init

from hybrid.mixers.base import FEATURE_MAPS, LinearMixer, OutputNorm
from hybrid.mixers.parts import HeadOptions, positive
from hybrid.precision import Float32Buffers
from hybrid.registry import register_mixer

if TYPE_CHECKING:
    from hybrid.config import HybridConfig


@dataclass(frozen=True)
class LinearAttentionOptions(HeadOptions):
    """Options that the plain linear mixers share.

    Attributes:
        num_heads: H; default D / 64, at least 1.
        head_dim: key dim K; default V, or D / H.
        value_head_dim: value dim V; default K.
        feature_map: what q and k go through.
        conv_size: width of a short causal convolution on q, k, v; null for none.
        output_norm: RMSNorm of the output over all heads (`layer`) or over each (`head`).
        output_norm_eps: epsilon of that norm; default the model's `norm_eps`. A large one leaves an
            output small that is small, where a small one blows it up to unit size.
        output_gate: multiply the normalised output by sigmoid(x W_g).
        bias: biases on the projections.
    """

    feature_map: Literal["identity", "silu", "relu", "elu+1"] = "silu"
    conv_size: int | None = None
    output_norm: Literal["layer", "head"] = "layer"
    output_norm_eps: float | None = None
    output_gate: bool = True
    bias: bool = False

    def problems(self, config: HybridConfig) -> list[str]:
        """Sizes that do not fit together."""
        return super().problems(config) + positive(output_norm_eps=self.output_norm_eps)


class PlainLinearAttention(LinearMixer):
    """q, k through a feature map; the output normalised and, if asked for, gated."""

    def __init__(
        self, options: LinearAttentionOptions, config: HybridConfig, layer_idx: int
    ) -> None:
        super().__init__(options, config, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.build(heads, key_dim, value_dim, options.conv_size, options.bias)
        eps = config.norm_eps if options.output_norm_eps is None else options.output_norm_eps
        self.norm = OutputNorm(options.output_norm, heads, value_dim, eps)
        self.gate_proj = None
        if options.output_gate:
            self.gate_proj = nn.Linear(config.hidden_size, heads * value_dim, bias=options.bias)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Equal dims; a convolution, unequal dims and the other norm; biases, no gate."""
        return [
            {"num_heads": 2},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, "conv_size": 4,
             "output_norm": "head"},
            {"num_heads": 2, "feature_map": "relu", "output_gate": False, "bias": True},
        ]  # fmt: skip

    def features(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The feature map on q and k."""
        phi = FEATURE_MAPS[self.options.feature_map]
        return phi(q), phi(k), v

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm(o) * sigmoid(x W_g)."""
        y = self.norm(o)
        return y if self.gate_proj is None else y * torch.sigmoid(self.gate_proj(x))


@dataclass(frozen=True)
class LightningAttentionOptions(LinearAttentionOptions):
    """Options of `lightning_attention`: those above, and

    Attributes:
        depth_scaled_decay: scale the decays from 1 at the first layer to 0 at the last, as MiniMax-01
            does; else every layer has the same.
    """

    depth_scaled_decay: bool = True


@register_mixer("lightning_attention", symbol="L")
class LightningAttention(Float32Buffers, PlainLinearAttention):
    """S_t = exp(-s_h) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t, with SiLU on q, k and v.

    The slope of head h (from 1) of H in layer l of n is s_h = 2^(-8 h / H) (1 - l / (n - 1) + 1e-5),
    ALiBi's slopes scaled by depth (arXiv 2501.08313, section 2.2; arXiv 2401.04658, eq. 8).
    """

    Options = LightningAttentionOptions
    paper = "arXiv 2401.04658; MiniMax-01 arXiv 2501.08313"
    formula = "G_t = exp(-s_h) 1^T 1, s_h fixed per head"
    used_by = "MiniMax-01, Ring-linear, HypeNet"
    float32_buffers = ("log_decay",)

    def __init__(
        self, options: LightningAttentionOptions, config: HybridConfig, layer_idx: int
    ) -> None:
        super().__init__(options, config, layer_idx)
        self.log_decay = nn.Buffer(self._log_decay(), persistent=False)

    def _log_decay(self) -> torch.Tensor:
        heads = torch.arange(1, self.num_heads + 1, dtype=torch.float32)
        depth = 1.0
        if self.options.depth_scaled_decay:
            depth = 1.0 - self.layer_idx / (self.config.num_hidden_layers - 1 + 1e-5) + 1e-5
        return -depth * torch.exp2(-8.0 * heads / self.num_heads)

    def init_parameters(self, std: float) -> None:
        """The decays are a function of the config, not a weight."""
        init.copy_(self.log_decay, self._log_decay())

    def features(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The feature map on q, k and v."""
        phi = FEATURE_MAPS[self.options.feature_map]
        return phi(q), phi(k), phi(v)

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """The fixed log decay, (H,)."""
        return {"log_decay": self.log_decay}
