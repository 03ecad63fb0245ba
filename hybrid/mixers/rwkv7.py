"""RWKV-7 time mixing: a generalised delta rule with vector gates (Goose, arXiv 2503.14456)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from hybrid.config.declare import Positive, Size
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.linear_mixer import LinearMixer
from hybrid.mixers.parts import (
    GroupedLayerNorm,
    HeadOptions,
    l2_normalize,
    low_rank,
    to_float32,
    token_before,
)
from hybrid.nn.past import Slot, StateSpec

# Inputs with a token shift of their own: of r, k, v, the decay w, the rate a and the gate g.
MIXED = 6
FASTEST = -math.exp(-0.5)  # the strongest log decay of a token


@dataclass(frozen=True)
class RWKV7Options(HeadOptions):
    """Options of ``rwkv7``.

    Attributes:
        num_heads: H; default D / 64, at least 1.
        head_dim: key dim K; default V, or D / H.
        value_head_dim: value dim V; default K.
        decay_rank, rate_rank: rank of the data-dependent part of the decay and of the in-context
            learning rate; default 2.5 sqrt(D) to the nearest multiple of 32, at least 32.
        gate_rank: rank of the output gate; default 5 sqrt(D), in the same way.
        norm_eps: epsilon of the norm of each head's output; the published value is 1e-5 * 64.
    """

    decay_rank: Size | None = None
    rate_rank: Size | None = None
    gate_rank: Size | None = None
    norm_eps: Positive = 64e-5

    def complete(self, hidden_size: int) -> RWKV7Options:
        """Return these options with heads, dims and ranks filled in."""
        done = super().complete(hidden_size)
        assert isinstance(done, RWKV7Options)
        shares = {"decay_rank": 2.5, "rate_rank": 2.5, "gate_rank": 5.0}
        ranks = {
            name: max(32, round(share * hidden_size**0.5 / 32) * 32)
            for name, share in shares.items()
            if getattr(self, name) is None
        }
        return replace(done, **ranks)


@register_mixer("rwkv7", symbol="r")
class RWKV7(LinearMixer):
    """RWKV-7 time mixing (arXiv 2503.14456, section 4), without the value residual across layers.

    S_t = (diag(w_t) - (a_t * c_t) c_t^T) S_{t-1} + k_t v_t^T, o_t = r_t^T S_t.

    c is the removal key: W_k x * xi, at length 1 per head. k is W_k x * (1 + (a - 1) * alpha).
    log w = -exp(-1/2) sigmoid(w_0 + tanh(x W_1) W_2), a = sigmoid(a_0 + x A_1 A_2), and the output is
    (GroupNorm(o) + (r . (rho * k)) v) * (sigmoid(x G_1) G_2). Each of r, k, v, w, a, g has its own
    fixed interpolation between a token and the previous one, which is a state.
    """

    Options = RWKV7Options
    paper = "arXiv 2503.14456"
    formula = "S_t = S_{t-1} (diag(w_t) - c_t (a_t * c_t)^T) + v_t k_t^T, |c_t| = 1"
    used_by = "RWKV-7 (Goose)"
    no_weight_decay = ("shift", "removal_scale", "rate_mix", "bonus")

    def __init__(self, options: RWKV7Options, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        assert options.decay_rank is not None
        assert options.rate_rank is not None
        assert options.gate_rank is not None
        self.build(heads, key_dim, value_dim, None)
        d_model, inner = sizes.hidden_size, heads * key_dim
        self.shift = nn.Parameter(torch.empty(MIXED, d_model))
        self.decay_proj = low_rank(d_model, options.decay_rank, inner, bias=True)
        self.rate_proj = low_rank(d_model, options.rate_rank, inner, bias=True)
        self.gate_proj = low_rank(d_model, options.gate_rank, heads * value_dim)
        self.removal_scale = nn.Parameter(torch.empty(inner))
        self.rate_mix = nn.Parameter(torch.empty(inner))
        self.bonus = nn.Parameter(torch.empty(heads, key_dim))
        self.norm = GroupedLayerNorm(heads, heads * value_dim, options.norm_eps, bias=True)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the options of the paper; and unequal dims; wide values."""
        ranks = {"decay_rank": 3, "rate_rank": 4, "gate_rank": 5}
        return [
            {"num_heads": 2, **ranks},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, **ranks},
            {"num_heads": 1, "head_dim": 4, "value_head_dim": 258, **ranks},
        ]

    def init_parameters(self, std: float) -> None:
        """Apply the published schedule over depth and channels; data-dependent parts start at zero."""
        layers = self.sizes.num_hidden_layers or 1
        depth = self.layer_idx / max(1, layers - 1)  # 0 to 1
        rest = 1 - self.layer_idx / layers  # 1 to almost 0
        channel = torch.arange(self.sizes.hidden_size) / self.sizes.hidden_size
        powers = (0.2, 0.7, 0.7, 0.9, 0.9, 0.2)
        init.copy_(self.shift, torch.stack([1 - channel ** (p * rest) for p in powers]))
        inner = self.removal_scale.numel()
        share = torch.arange(inner) / max(1, inner - 1)
        line = share - 0.5
        within = torch.arange(inner) % self.key_dim
        zigzag = 2 * within / max(1, self.key_dim - 1) - 1
        zigzag = zigzag * zigzag.abs()
        decay = -6 + 6 * share ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
        biases = (decay, -0.19 + 0.3 * zigzag + 0.4 * line)
        for proj, bias in zip((self.decay_proj, self.rate_proj), biases, strict=True):
            init.copy_(list(proj.parameters())[2], bias)
        for proj in (self.decay_proj, self.rate_proj, self.gate_proj):
            down, up = list(proj.parameters())[:2]
            init.zeros_(down)
            init.orthogonal_(up, gain=0.1)
        init.copy_(self.removal_scale, 0.71 - 0.1 * line)
        init.constant_(self.rate_mix, 1.02)
        init.constant_(self.bonus, -0.04)

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        step = token_before(x, cu_seqlens, cache) - x
        x_r, x_k, x_v, x_w, x_a, x_g = (x + step * m for m in self.shift)
        r, k, v = (p(y) for p, y in zip(self._projections(), (x_r, x_k, x_v), strict=True))
        rate = torch.sigmoid(to_float32(self.rate_proj(x_a)))
        removal = l2_normalize(self._heads(to_float32(k) * to_float32(self.removal_scale)))
        k = (to_float32(k) * (1 + (rate - 1) * to_float32(self.rate_mix))).to(k.dtype)
        r, k, v, rate = (self._heads(y) for y in (r, k, v, rate))
        gates: dict[str, Any] = {**self._decay(x_w, removal), "erase_key": -rate * removal}
        o = self.norm(self.recur(r, k, v, cu_seqlens, cache, **gates).flatten(-2))
        own = (to_float32(r) * to_float32(self.bonus) * to_float32(k)).sum(
            -1, keepdim=True
        ) * to_float32(v)
        down, up = self.gate_proj
        gate = up(torch.sigmoid(down(x_g)))
        return self.o_proj((o + own.flatten(-2).to(o.dtype)) * gate)

    def _projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.q_proj, self.k_proj, self.v_proj

    def _heads(self, y: torch.Tensor) -> torch.Tensor:
        """(B, T, H * dim) -> (B, T, H, dim)."""
        return y.unflatten(-1, (self.num_heads, -1))

    def _decay(self, x: torch.Tensor, removal: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return log w (B, T, H, K), and the removal key as it reads the decayed state."""
        down, up = self.decay_proj
        log_decay = self._heads(FASTEST * torch.sigmoid(to_float32(up(torch.tanh(down(x))))))
        # The removal key reads the state before its decay, which is above 0.54.
        return {"log_decay": log_decay, "erase_query": removal * (-log_decay).exp()}

    def mixing_flops(self, context: int) -> float:
        """Count decay, removal, write and read of a K x V state: 1 + 4 + 2 + 2 FLOPs an element."""
        return 9.0 * self.num_heads * self.key_dim * self.value_dim

    def states(self) -> dict[str, StateSpec]:
        """Return one K x V state per head, and the previous token."""
        return {**super().states(), "conv": StateSpec((self.sizes.hidden_size, 1))}
