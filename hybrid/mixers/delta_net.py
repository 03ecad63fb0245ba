"""DeltaNet: the delta rule, no decay (arXiv 2406.06484), and the body that its descendants share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.config.declare import Positive, Size, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.base import LinearMixer
from hybrid.mixers.parts import GatedRMSNorm, HeadOptions, divides, l2_normalize, wide


@dataclass(frozen=True)
class DeltaRuleOptions(HeadOptions):
    """Options of the mixers that use the delta rule.

    Attributes:
        num_heads: H, heads of v and of the state; default D / 128, at least 1.
        num_key_heads: heads of q and k, each serving H / num_key_heads heads; default H.
        head_dim: key dim K; default V, or D / H.
        value_head_dim: value dim V; default K.
        conv_size: width of the short convolution on q, k, v; null for none.
        negative_eigenvalues: beta in (0, 2) and not (0, 1), so that a transition can flip the sign
            of what is stored (arXiv 2411.12537).
        output_gate: gate the normalised output.
        output_norm_eps: epsilon of that norm; default the model's `norm_eps`.
    """

    num_key_heads: Size | None = None
    conv_size: Size2 | None = 4
    negative_eigenvalues: bool = False
    output_gate: bool = True
    output_norm_eps: Positive | None = None

    width = 128

    def complete(self, hidden_size: int) -> DeltaRuleOptions:
        """Fill in heads and dims."""
        done = super().complete(hidden_size)
        assert isinstance(done, DeltaRuleOptions)
        keys = done.num_heads if self.num_key_heads is None else self.num_key_heads
        return replace(done, num_key_heads=keys)

    def problems(self, sizes: Sizes) -> list[str]:
        """Sizes that do not fit together."""
        lines = super().problems(sizes)
        done = self.complete(sizes.hidden_size)
        if not lines:
            lines += divides("num_key_heads", done.num_key_heads, "num_heads", done.num_heads)
        return lines


class DeltaRuleMixer(LinearMixer):
    """S_t = G_t * (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = q_t^T S_t / sqrt(K).

    q, k, v through a short convolution and SiLU; q and k L2-normalised; beta = sigmoid(x W_beta), or
    twice that; output RMSNorm(o) per head, and gated. Subclasses give G_t (`gates`).
    """

    gate_activation = "silu"

    def __init__(self, options: DeltaRuleOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.scale = key_dim**-0.5
        self.build(
            heads,
            key_dim,
            value_dim,
            options.conv_size,
            key_heads=options.num_key_heads,
            conv_activation="silu",
        )
        self.beta_proj = nn.Linear(sizes.hidden_size, heads, bias=False)
        self.gate_proj = self.build_gate() if options.output_gate else None
        eps = sizes.norm_eps if options.output_norm_eps is None else options.output_norm_eps
        self.norm = GatedRMSNorm(value_dim, eps, self.gate_activation)

    def build_gate(self) -> nn.Module:
        """The projection of the output gate, D -> H * V."""
        return nn.Linear(self.sizes.hidden_size, self.num_heads * self.value_dim, bias=False)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Grouped heads and unequal dims; negative eigenvalues, no convolution, no gate."""
        return [
            {"num_heads": 4, "num_key_heads": 2, "head_dim": 6, "value_head_dim": 8},
            {"num_heads": 2, "conv_size": None, "negative_eigenvalues": True,
             "output_gate": False, "output_norm_eps": 1e-3},
        ]  # fmt: skip

    def features(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """SiLU, then q and k at length 1."""
        if self.conv is None:  # which applies it otherwise
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        return l2_normalize(q), l2_normalize(k), v

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """beta (B, T, H)."""
        beta = torch.sigmoid(wide(self.beta_proj(x)))
        return {"beta": 2 * beta if self.options.negative_eigenvalues else beta}

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm(o) per head, times the activated gate."""
        return self.norm(o, None if self.gate_proj is None else self.gate_proj(x))

    def mixing_flops(self, context: int) -> float:
        """Decay, recall, write and read of a K x V state per head: 1 + 2 + 2 + 2 FLOPs an element."""
        return 7.0 * self.num_heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class DeltaNetOptions(DeltaRuleOptions):
    """Options of `delta_net`: those of the delta rule, ungated by default as in the paper."""

    output_gate: bool = False


@register_mixer("delta_net", symbol="P")
class DeltaNet(DeltaRuleMixer):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T (arXiv 2406.06484, eq. 3)."""

    Options = DeltaNetOptions
    paper = "arXiv 2406.06484; negative eigenvalues arXiv 2411.12537"
    formula = "S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T"
    used_by = "DeltaNet"

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """As the paper has it; grouped heads, a gate, negative eigenvalues."""
        return [
            {"num_heads": 2},
            {"num_heads": 4, "num_key_heads": 2, "head_dim": 6, "value_head_dim": 5,
             "output_gate": True, "negative_eigenvalues": True, "conv_size": None},
        ]  # fmt: skip
