"""Gated DeltaNet: the delta rule with a scalar decay (arXiv 2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.delta_net import DeltaRuleOptions, ScalarDecayDeltaRule


@dataclass(frozen=True)
class GatedDeltaNetOptions(DeltaRuleOptions):
    """Options of ``gated_delta_net``: those of the delta rule."""


@register_mixer("gated_delta_net", symbol="D")
class GatedDeltaNet(ScalarDecayDeltaRule):
    """Gated DeltaNet mixer (arXiv 2412.06464, eq. 10).

    S_t = gamma_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T.

    gamma_t = exp(-exp(A_log) softplus(x W_a + dt_bias)), one per head, as in Mamba-2. The output is
    RMSNorm(o) * silu(x W_g) per head.
    """

    Options = GatedDeltaNetOptions
    paper = "arXiv 2412.06464; negative eigenvalues arXiv 2411.12537"
    formula = "S_t = gamma_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T"
    used_by = "Qwen3-Next, Qwen3.5, OLMo Hybrid"

    def __init__(self, options: GatedDeltaNetOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        self.build_decay()
