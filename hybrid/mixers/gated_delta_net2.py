"""Gated DeltaNet-2: the delta rule with gates of erasing and writing (arXiv 2605.22791)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.kimi_delta_attention import KimiDeltaAttention, KimiDeltaAttentionOptions
from hybrid.mixers.parts import to_float32
from hybrid.nn.past import Slot


@dataclass(frozen=True)
class GatedDeltaNet2Options(KimiDeltaAttentionOptions):
    """Options of ``gated_delta_net2``: those of Kimi Delta Attention.

    ``negative_eigenvalues`` doubles the erase gate.

    Attributes:
        gate_bias: add a bias to the output gate, as published.
    """

    gate_bias: bool = True


@register_mixer("gated_delta_net2", symbol="e")
class GatedDeltaNet2(KimiDeltaAttention):
    """Gated DeltaNet-2 mixer (arXiv 2605.22791).

    S_t = (I - k_t (b_t * k_t)^T) diag(alpha_t) S_{t-1} + k_t (w_t * v_t)^T.

    In place of the scalar beta of Kimi Delta Attention, b = sigmoid(x W_b) erases per key channel and
    w = sigmoid(x W_w) writes per value channel. Decay, convolution, normalisation and output are those
    of Kimi Delta Attention, which b = w = beta recovers.
    """

    Options = GatedDeltaNet2Options
    paper = "arXiv 2605.22791; negative eigenvalues arXiv 2411.12537"
    formula = "S_t = S_{t-1} diag(alpha_t) (I - (b_t * k_t) k_t^T) + (w_t * v_t) k_t^T"
    used_by = "Gated DeltaNet-2"

    def build_strength(self, sizes: Sizes, writes: int) -> None:
        """Create the projections of both gates."""
        inner_key, inner = self.key_heads * self.key_dim, self.num_heads * self.value_dim
        self.erase_proj = nn.Linear(sizes.hidden_size, inner_key, bias=False)
        self.write_proj = nn.Linear(sizes.hidden_size, inner, bias=False)

    def strength(self, x: torch.Tensor) -> dict[str, Any]:
        """Return nothing: the gates depend on k and v (``mix``)."""
        return {}

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        q, k, v = self.project(x, cu_seqlens, cache)
        erase, write = self.channel_gates(x)
        shared = self.num_heads // self.key_heads
        key = to_float32(k)
        a, b = (y.repeat_interleave(shared, dim=2) for y in (-key, erase * key))
        v = (write * to_float32(v)).to(v.dtype)
        gates = {**self.gates(x), "erase_key": a, "erase_query": b}
        return self.o_proj(self.read(self.recur(q, k, v, cu_seqlens, cache, **gates), x))

    def channel_gates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return b (B, T, H_k, K) and w (B, T, H, V)."""
        erase = torch.sigmoid(to_float32(self.erase_proj(x))).unflatten(-1, (-1, self.key_dim))
        write = torch.sigmoid(to_float32(self.write_proj(x))).unflatten(-1, (-1, self.value_dim))
        return (2 * erase if self.options.negative_eigenvalues else erase), write
