"""Gated DeltaNet: the delta rule with a scalar decay (arXiv 2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.delta_net import DeltaRuleMixer, DeltaRuleOptions
from hybrid.mixers.parts import init_log_uniform, init_time_step, softplus_log_decay


@dataclass(frozen=True)
class GatedDeltaNetOptions(DeltaRuleOptions):
    """Options of ``gated_delta_net``: those of the delta rule."""


@register_mixer("gated_delta_net", symbol="D")
class GatedDeltaNet(DeltaRuleMixer):
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
        self.decay_proj = nn.Linear(sizes.hidden_size, self.num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))

    def init_parameters(self, std: float) -> None:
        """Draw exp(A_log) uniformly from (0, 16] and time steps as in Mamba-2."""
        init_log_uniform(self.A_log, 0.01, 16.0)  # away from 0, whose log is -inf
        init_time_step(self.dt_bias)

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return beta and log gamma, both (B, T, H)."""
        log_decay = softplus_log_decay(self.decay_proj(x), self.dt_bias, self.A_log)
        return {**super().gates(x), "log_decay": log_decay}
