"""RWKV-6 time mixing: token shift, double exponential decay and bonus (Finch, arXiv 2404.05892)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.declare import Positive, Size
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.linear_mixer import LinearMixer
from hybrid.mixers.parts import (
    GroupedLayerNorm,
    HeadOptions,
    low_rank,
    to_float32,
    token_before,
)
from hybrid.nn.past import Slot, StateSpec

MIXED = 5  # inputs of r, k, v, the decay w and the gate g, each with its own token shift


@dataclass(frozen=True)
class RWKV6Options(HeadOptions):
    """Options of ``rwkv6``.

    Attributes:
        num_heads: H; default D / 64, at least 1.
        head_dim: key dim K; default V, or D / H.
        value_head_dim: value dim V; default K.
        shift_rank: rank of the data-dependent part of each of the five token shifts.
        decay_rank: rank of the data-dependent part of the decay.
        norm_eps: epsilon of the norm of each head's output; the published value is 1e-5 * 8^2.
    """

    shift_rank: Size = 32
    decay_rank: Size = 64
    norm_eps: Positive = 64e-5


@register_mixer("rwkv6", symbol="R")
class RWKV6(LinearMixer):
    """RWKV-6 time mixing (arXiv 2404.05892, eq. 12 to 20).

    S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_t^T, o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T).

    Each of r, k, v, w, g is projected from its own interpolation between a token and the previous one:
    lerp_c(x_t, x_{t-1}) = x_t + (x_{t-1} - x_t) * (mu_c + tanh(z_t A_c) B_c). z_t is the same
    interpolation with weights mu_x. w = w_0 + tanh(x_w A_w) B_w. The output is GroupNorm(o) * silu(g).
    The previous token is a state.
    """

    Options = RWKV6Options
    paper = "arXiv 2404.05892"
    formula = "G_t = alpha_t^T 1, alpha_t = exp(-exp(x_t W_a)); reads S_{t-1} + diag(u) k_t v_t"
    used_by = "RWKV-6 (Finch)"
    no_weight_decay = ("bonus", "shift")

    def __init__(self, options: RWKV6Options, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.build(heads, key_dim, value_dim, None)
        d_model, rank = sizes.hidden_size, options.shift_rank
        self.gate_proj = nn.Linear(d_model, heads * value_dim, bias=False)
        self.shift_base = nn.Parameter(torch.empty(d_model))
        self.shift = nn.Parameter(torch.empty(MIXED, d_model))
        self.shift_down = nn.Linear(d_model, MIXED * rank, bias=False)
        self.shift_up = nn.Parameter(torch.empty(MIXED, rank, d_model))
        self.decay_base = nn.Parameter(torch.empty(heads * key_dim))
        self.decay_proj = low_rank(d_model, options.decay_rank, heads * key_dim)
        self.bonus = nn.Parameter(torch.empty(heads, key_dim))
        self.norm = GroupedLayerNorm(heads, heads * value_dim, options.norm_eps, bias=True)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the options of the paper; and unequal dims."""
        return [
            {"num_heads": 2, "shift_rank": 3, "decay_rank": 4},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, "shift_rank": 2, "decay_rank": 3},
        ]

    def init_parameters(self, std: float) -> None:
        """Apply the published schedule over depth and channels; data-dependent parts start at zero."""
        layers = self.sizes.num_hidden_layers or 1
        depth = self.layer_idx / max(1, layers - 1)  # 0 to 1
        rest = 1 - self.layer_idx / layers  # 1 to almost 0
        channel = torch.arange(self.sizes.hidden_size) / self.sizes.hidden_size
        power = channel**rest
        slow = channel ** (0.5 * rest)
        init.copy_(self.shift_base, 1 - power)
        shifts = [1 - slow, 1 - power, 1 - power - 0.3 * depth, 1 - power, 1 - slow]
        init.copy_(self.shift, torch.stack(shifts))
        init.zeros_(self.shift_down.weight)
        init.uniform_(self.shift_up, -0.01, 0.01)
        inner = torch.arange(self.bonus.numel())
        share = inner / max(1, self.bonus.numel() - 1)
        init.copy_(self.decay_base, -6 + 5 * share ** (0.7 + 1.3 * depth))
        down, up = self.decay_proj.parameters()
        init.zeros_(down)
        init.uniform_(up, -0.01, 0.01)
        zigzag = ((inner + 1) % 3 - 1) * 0.1
        bonus = depth * (1 - share) + zigzag
        init.copy_(self.bonus, bonus.view_as(self.bonus))

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        x_r, x_k, x_v, x_w, x_g = self._shifted(x, cu_seqlens, cache)
        r, k = (y.unflatten(-1, (self.num_heads, -1)) for y in (self.q_proj(x_r), self.k_proj(x_k)))
        v = self.v_proj(x_v).unflatten(-1, (self.num_heads, -1))
        down, up = self.decay_proj
        w = to_float32(self.decay_base) + to_float32(up(torch.tanh(down(x_w))))
        log_decay = -w.exp().unflatten(-1, (self.num_heads, -1))
        o = self.recur(r, k, v, cu_seqlens, cache, log_decay=log_decay, bonus=self.bonus)
        return self.o_proj(self.norm(o.flatten(-2)) * F.silu(self.gate_proj(x_g)))

    def _shifted(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> tuple[torch.Tensor, ...]:
        """Return the five interpolations of x (B, T, D) and the previous token."""
        step = token_before(x, cu_seqlens, cache) - x
        z = torch.tanh(self.shift_down(x + step * self.shift_base))
        z = z.unflatten(-1, (MIXED, -1))
        moved = torch.einsum("btcr,crd->cbtd", z, self.shift_up) + self.shift[:, None, None]
        return tuple(x + step * m for m in moved)

    def mixing_flops(self, context: int) -> float:
        """Count the recurrence, and the data-dependent part of the shift."""
        return super().mixing_flops(context) + 2.0 * self.shift_up.numel()

    def states(self) -> dict[str, StateSpec]:
        """Return one K x V state per head, and the previous token."""
        return {**super().states(), "conv": StateSpec((self.sizes.hidden_size, 1))}
