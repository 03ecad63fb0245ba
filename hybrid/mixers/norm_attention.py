"""NormAttention: no decay, the output's norm keeps it stable (TransNormer, arXiv 2210.10340)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybrid.config.registry import register_mixer
from hybrid.mixers.lightning_attention import LinearAttentionOptions, PlainLinearAttention


@dataclass(frozen=True)
class NormAttentionOptions(LinearAttentionOptions):
    """Options of `norm_attention`: those of the plain linear mixers, with TransNormer's defaults."""

    feature_map: Literal["identity", "silu", "relu", "elu+1"] = "elu+1"
    output_gate: bool = False


@register_mixer("norm_attention", symbol="N")
class NormAttention(PlainLinearAttention):
    """S_t = S_{t-1} + k_t v_t^T, y_t = RMSNorm(q_t^T S_t) (arXiv 2210.10340, eq. 8).

    The norm takes the place of linear attention's denominator, whose gradient is unbounded.
    """

    Options = NormAttentionOptions
    paper = "arXiv 2210.10340"
    formula = "G_t = 1^T 1, output RMSNorm(S_t q_t)"
    used_by = "TransNormer"
