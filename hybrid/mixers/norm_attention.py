"""NormAttention: no decay; a norm of the output stabilises it (TransNormer, arXiv 2210.10340)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybrid.config.registry import register_mixer
from hybrid.mixers.lightning_attention import LinearAttentionOptions, PlainLinearAttention


@dataclass(frozen=True)
class NormAttentionOptions(LinearAttentionOptions):
    """Options of ``norm_attention``: ``LinearAttentionOptions`` with the defaults of TransNormer."""

    feature_map: Literal["identity", "silu", "relu", "elu+1"] = "elu+1"
    output_gate: bool = False


@register_mixer("norm_attention", symbol="N")
class NormAttention(PlainLinearAttention):
    """NormAttention mixer (arXiv 2210.10340, eq. 8).

    S_t = S_{t-1} + k_t v_t^T, y_t = RMSNorm(q_t^T S_t). The norm replaces the denominator of linear
    attention, whose gradient is unbounded.
    """

    Options = NormAttentionOptions
    paper = "arXiv 2210.10340"
    formula = "G_t = 1^T 1, output RMSNorm(S_t q_t)"
    used_by = "TransNormer"
