"""Lightning attention: a fixed decay per head (arXiv 2401.04658; MiniMax-01, arXiv 2501.08313)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import initialization as init

from hybrid.config.declare import Positive, ShareOrAll, Size, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.linear_mixer import FEATURE_MAPS, LinearMixer, OutputNorm
from hybrid.mixers.parts import GroupedRMSNorm, HeadOptions, divides
from hybrid.mixers.rotation import positioned, rope_angles
from hybrid.nn.norms import build_norm
from hybrid.nn.past import Slot
from hybrid.nn.precision import Float32Buffers


@dataclass(frozen=True)
class LinearAttentionOptions(HeadOptions):
    """Options of linear mixers without data-dependent gates.

    Attributes:
        num_heads: H; default D / 64, at least 1.
        head_dim: key dim K; default V, or D / H.
        value_head_dim: value dim V; default K.
        feature_map: feature map of q and k.
        conv_size: width of a short causal convolution on q, k, v; null for no convolution.
        output_norm: RMSNorm of the output over all heads (``layer``) or over each head (``head``).
        output_norm_eps: epsilon of that norm; default the model's ``norm_eps``. With a large epsilon
            small outputs stay small; with a small one they are scaled up to unit size.
        output_gate: multiply the normalised output by sigmoid(x W_g).
        bias: add biases to the projections.
    """

    feature_map: Literal["identity", "silu", "relu", "elu+1"] = "silu"
    conv_size: Size2 | None = None
    output_norm: Literal["layer", "head"] = "layer"
    output_norm_eps: Positive | None = None
    output_gate: bool = True
    bias: bool = False


class PlainLinearAttention(LinearMixer):
    """Base class of linear mixers with a feature map on q and k and a norm and optional gate on o."""

    def __init__(self, options: LinearAttentionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.build(heads, key_dim, value_dim, options.conv_size, options.bias)
        eps = sizes.norm_eps if options.output_norm_eps is None else options.output_norm_eps
        self.norm = OutputNorm(options.output_norm, heads, value_dim, eps)
        self.gate_proj = None
        if options.output_gate:
            self.gate_proj = nn.Linear(sizes.hidden_size, heads * value_dim, bias=options.bias)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return equal dims; unequal dims with a convolution and a norm per head; biases, no gate."""
        return [
            {"num_heads": 2},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, "conv_size": 4,
             "output_norm": "head"},
            {"num_heads": 2, "feature_map": "relu", "output_gate": False, "bias": True},
        ]  # fmt: skip

    def features(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Apply the feature map to q and k."""
        phi = FEATURE_MAPS[self.options.feature_map]
        return phi(q), phi(k), v

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return RMSNorm(o) * sigmoid(x W_g), (B, T, H * V)."""
        y = self.norm(o)
        return y if self.gate_proj is None else y * torch.sigmoid(self.gate_proj(x))


@dataclass(frozen=True)
class LightningAttentionOptions(LinearAttentionOptions):
    """Options of ``lightning_attention``, in addition to those of ``LinearAttentionOptions``.

    Attributes:
        depth_scaled_decay: scale the log decays by a factor from 1 in the first layer to 0 in the last
            (MiniMax-01). False: all layers have the same decays.
        depth_offset: index of the first layer in that scaling: 0, or -1 (Ring-linear), where the scale
            reaches 0 one layer later.
        qk_norm: RMSNorm of q and k over each head, after the feature map (Ring-linear).
        rope_theta: base of the rotary positions of q and k; null for no positions.
        rotary_share: share of K that is rotated.
        scaled: multiply the output by K ** -0.5.
        output_norm_groups: number of equal groups of channels that ``output_norm: layer`` normalises
            separately (4 in Ring-linear).
    """

    depth_scaled_decay: bool = True
    depth_offset: Literal[0, -1] = 0
    qk_norm: bool = False
    rope_theta: Positive | None = None
    rotary_share: ShareOrAll = 1.0
    scaled: bool = False
    output_norm_groups: Size = 1

    @property
    def rotated(self) -> int:
        """Number of rotated channels of K, of completed options."""
        return 0 if self.rope_theta is None else int(self.sizes[1] * self.rotary_share)

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes."""
        lines = super().problems(sizes)
        if lines:
            return lines
        done = self.complete(sizes.hidden_size)
        assert isinstance(done, LightningAttentionOptions)
        if done.rotated % 2:
            lines.append(
                f"rotary_share: expected an even number of rotated dims, got {done.rotated} of head_dim"
                f" {done.sizes[1]}"
            )
        inner = done.sizes[0] * done.sizes[2]
        lines += divides(
            "output_norm_groups", self.output_norm_groups, "num_heads * value_head_dim", inner
        )
        if self.output_norm_groups > 1 and self.output_norm == "head":
            lines.append(
                f"output_norm_groups: expected 1 with output_norm 'head', got {self.output_norm_groups}"
            )
        return lines


@register_mixer("lightning_attention", symbol="L")
class LightningAttention(Float32Buffers, PlainLinearAttention):
    """Lightning attention mixer (arXiv 2401.04658, eq. 8; MiniMax-01, arXiv 2501.08313, section 2.2).

    S_t = exp(-s_h) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t, with SiLU on q, k and v.

    The slope of head h (from 1) of H in layer l (from 0) of n is
    s_h = 2^(-8 h / H) (1 - l / (n - 1) + 1e-5): ALiBi's slopes, scaled by depth. With ``rope_theta``, q
    and k are rotated; see ``hybrid.mixers.rotation``.
    """

    Options = LightningAttentionOptions
    paper = "arXiv 2401.04658; MiniMax-01 arXiv 2501.08313"
    formula = "G_t = exp(-s_h) 1^T 1, s_h fixed per head"
    used_by = "MiniMax-01, Ring-linear, HypeNet"
    float32_buffers = ("log_decay", "theta")

    def __init__(self, options: LightningAttentionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.log_decay = nn.Buffer(self._log_decay(), persistent=False)
        self.theta = nn.Buffer(self._theta(), persistent=False)
        self.scale = key_dim**-0.5 if options.scaled else 1.0
        self.q_norm = self.k_norm = None
        if options.qk_norm:
            self.q_norm, self.k_norm = (
                build_norm("rmsnorm", key_dim, sizes.norm_eps) for _ in range(2)
            )
        if options.output_norm_groups > 1:
            eps = sizes.norm_eps if options.output_norm_eps is None else options.output_norm_eps
            norm = GroupedRMSNorm(options.output_norm_groups, heads * value_dim, eps)
            self.norm = nn.Sequential(nn.Flatten(-2), norm)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the sets of the base class, and the options of Ring-linear."""
        return [
            *super().samples(),
            {"num_heads": 2, "head_dim": 8, "feature_map": "identity", "depth_offset": -1,
             "qk_norm": True, "rope_theta": 100.0, "rotary_share": 0.5, "scaled": True,
             "output_norm_groups": 4},
        ]  # fmt: skip

    def _theta(self) -> torch.Tensor:
        return rope_angles(self.options.rope_theta, self.options.rotated)

    def _log_decay(self) -> torch.Tensor:
        heads = torch.arange(1, self.num_heads + 1, dtype=torch.float32)
        depth = 1.0
        if self.options.depth_scaled_decay:
            last = max(1, self.sizes.num_hidden_layers - 1)
            if self.options.depth_offset:
                depth = 1.0 - (self.layer_idx + self.options.depth_offset) / last + 1e-5
            else:
                depth = 1.0 - self.layer_idx / (last + 1e-5) + 1e-5
        return -depth * torch.exp2(-8.0 * heads / self.num_heads)

    def init_parameters(self, std: float) -> None:
        """Compute decays and angles, which are functions of the config and not weights."""
        init.copy_(self.log_decay, self._log_decay())
        init.copy_(self.theta, self._theta())

    def features(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Apply the feature map to q, k and v, then the norm to q and k."""
        phi = FEATURE_MAPS[self.options.feature_map]
        q, k, v = phi(q), phi(k), phi(v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

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
        """Run the recurrence, with q and k rotated if there are positions: o (B, T, H, V)."""
        if self.theta.numel():
            q, k, carry = positioned(q, k, self.theta, cu_seqlens)
        return super().recur(q, k, v, cu_seqlens, cache, carry=carry, **gates)

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return the fixed log decay, (H,)."""
        return {"log_decay": self.log_decay}
