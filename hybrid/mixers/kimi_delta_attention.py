"""Kimi Delta Attention: the delta rule with a decay per key channel (arXiv 2510.26692)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from hybrid.config.declare import Negative, Size0
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.delta_net import DeltaRuleMixer, DeltaRuleOptions
from hybrid.mixers.parts import (
    init_log_uniform,
    init_time_step,
    low_rank,
    softplus_log_decay,
    to_float32,
)


@dataclass(frozen=True)
class KimiDeltaAttentionOptions(DeltaRuleOptions):
    """Options of ``kimi_delta_attention``, in addition to those of the delta rule.

    Attributes:
        decay_gate: ``softplus``: log decay = -exp(A_log) softplus(f + dt_bias) (Kimi Linear).
            ``bounded``: log decay = lower_bound * sigmoid(exp(A_log) (f + dt_bias)), never below
            lower_bound (Ling 3.0).
        lower_bound: lower bound of the log decay per token, for ``bounded``; below 0.
        gate_rank: rank of the maps x -> f and x -> output gate; default V; 0 for full matrices.
        gate_bias: add a bias to the output gate.
    """

    decay_gate: Literal["softplus", "bounded"] = "softplus"
    lower_bound: Negative = -5.0
    gate_rank: Size0 | None = None
    gate_bias: bool = False

    def complete(self, hidden_size: int) -> KimiDeltaAttentionOptions:
        """Return these options with heads, dims and the rank filled in."""
        done = super().complete(hidden_size)
        assert isinstance(done, KimiDeltaAttentionOptions)
        return replace(
            done, gate_rank=done.value_head_dim if self.gate_rank is None else self.gate_rank
        )


@register_mixer("kimi_delta_attention", symbol="K")
class KimiDeltaAttention(DeltaRuleMixer):
    """Kimi Delta Attention mixer (arXiv 2510.26692, eq. 1).

    S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T.

    alpha_t = exp(-exp(A_log) softplus(f(x) + dt_bias)), one per key channel, with f of low rank. The
    output is RMSNorm(o) * sigmoid(g(x)) per head, with g of low rank. With ``decay_gate: bounded`` the
    log decay stays above ``lower_bound``, so that kernels can rescale without a guard.
    """

    Options = KimiDeltaAttentionOptions
    paper = "arXiv 2510.26692"
    formula = "S_t = S_{t-1} diag(alpha_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T"
    used_by = "Kimi Linear, Ling 3.0"
    gate_activation = "sigmoid"

    def __init__(self, options: KimiDeltaAttentionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        inner = self.num_heads * self.key_dim
        self.decay_proj = self._map(inner)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(inner))

    def build_gate(self) -> nn.Module:
        """Return the projection of the output gate, D -> H * V."""
        return self._map(self.num_heads * self.value_dim, self.options.gate_bias)

    def _map(self, d_out: int, bias: bool = False) -> nn.Module:
        d_model, rank = self.sizes.hidden_size, self.options.gate_rank
        return (
            low_rank(d_model, rank, d_out, bias) if rank else nn.Linear(d_model, d_out, bias=bias)
        )

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return unequal dims as in Kimi Linear; the bounded gate, full matrices, grouped heads."""
        return [
            {"num_heads": 2, "head_dim": 6, "value_head_dim": 8},
            {"num_heads": 4, "num_key_heads": 2, "decay_gate": "bounded", "gate_rank": 0,
             "gate_bias": True, "negative_eigenvalues": True, "conv_size": None},
        ]  # fmt: skip

    def init_parameters(self, std: float) -> None:
        """Draw exp(A_log) uniformly from [1, 16] and time steps as in Mamba-2."""
        init_log_uniform(self.A_log, 1.0, 16.0)
        init_time_step(self.dt_bias)

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return beta (B, T, H) and log alpha (B, T, H, K)."""
        f = self.decay_proj(x).unflatten(-1, (self.num_heads, -1))
        bias, rate = self.dt_bias.unflatten(0, (self.num_heads, -1)), self.A_log.unsqueeze(-1)
        if self.options.decay_gate == "bounded":
            gate = torch.sigmoid(to_float32(rate).exp() * (to_float32(f) + to_float32(bias)))
            log_decay = self.options.lower_bound * gate
        else:
            log_decay = softplus_log_decay(f, bias, rate)
        return {**super().gates(x), "log_decay": log_decay}
