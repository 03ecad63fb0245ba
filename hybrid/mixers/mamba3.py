"""Mamba-3: trapezoidal discretisation and complex states, without a convolution (arXiv 2603.15569).

Shapes: B batch, T time, H heads, P head dim, N state size, G groups of B and C, J rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.declare import Positive, ShareOrAll, Size
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.base import MixerOptions
from hybrid.mixers.linear_mixer import LinearMixer
from hybrid.mixers.parts import (
    GroupedRMSNorm,
    divides,
    init_time_step,
    step_problems,
    to_float32,
    token_before,
    too_wide,
)
from hybrid.mixers.rotation import rotate, rotate_state, running_angle
from hybrid.nn.norms import build_norm
from hybrid.nn.past import Slot, StateSpec


@dataclass(frozen=True)
class Mamba3Options(MixerOptions):
    """Options of ``mamba3``.

    Attributes:
        num_heads: H; default ``expand`` * D / P.
        head_dim: P, values per head.
        state_size: N, size of B and C.
        num_groups: G, groups of heads that share B and C, up to their biases.
        expand: H P / D, where ``num_heads`` is not given.
        rotated: share of N that is rotated, above 0; 0.5 or 1 as published.
        output_norm: normalise each head's output before its gate.
        dt_min, dt_max, dt_floor: initial time steps, log-uniform in [dt_min, dt_max].
        decay_floor: least decay rate -A.
    """

    num_heads: Size | None = None
    head_dim: Size = 64
    state_size: Size = 128
    num_groups: Size = 1
    expand: Positive = 2.0
    rotated: ShareOrAll = 0.5
    output_norm: bool = False
    dt_min: Positive = 1e-3
    dt_max: Positive = 0.1
    dt_floor: Positive = 1e-4
    decay_floor: Positive = 1e-4

    def complete(self, hidden_size: int) -> Mamba3Options:
        """Return these options with heads filled in."""
        heads = self.num_heads
        if heads is None:
            heads = max(1, int(self.expand * hidden_size) // max(1, self.head_dim))
        return replace(self, num_heads=heads)

    @property
    def pairs(self) -> int:
        """J."""
        return int(self.state_size * self.rotated) // 2

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes."""
        lines = too_wide(head_dim=self.head_dim, state_size=self.state_size)
        heads = self.complete(sizes.hidden_size).num_heads
        assert heads is not None
        lines += divides("num_groups", self.num_groups, "num_heads", heads)
        if not self.pairs:
            lines.append(
                f"state_size: expected at least one pair to rotate, got {self.state_size}; try"
                f" {int(2 / self.rotated)}"
            )
        return lines + step_problems(self.dt_min, self.dt_max)


@register_mixer("mamba3", symbol="t")
class Mamba3(LinearMixer):
    """Mamba-3 mixer with one input and one output per head (arXiv 2603.15569, section 3).

    S_t = a_t R_t (S_{t-1} + (1 - l_t) dt_t B_{t-1} x_{t-1}^T) + l_t dt_t B_t x_t^T,
    y_t = C_t^T S_t + D x_t, the trapezoidal rule.

    a_t = exp(dt_t A_t), A_t = -softplus(u W_A), l_t = sigmoid(u W_l), and R_t rotates pairs of channels
    by dt_t u W_theta: complex eigenvalues. B and C are normalised and have a bias per head. The output
    is gated by silu(u W_z). There is no convolution. The MIMO variant is not implemented.

    For the op, B_{t-1} x_{t-1}^T is written once, at t, with the weight a_t (l_{t-1} dt_{t-1} + (1 -
    l_t) dt_t); the present token adds l_t dt_t (C_t . B_t) x_t to the output.
    """

    Options = Mamba3Options
    paper = "arXiv 2603.15569"
    formula = (
        "G_t = a_t R_t 1^T; writes l_t dt_t x_t B_t^T + (1 - l_t) dt_t G_t * x_{t-1} B_{t-1}^T"
    )
    used_by = "Mamba-3"
    no_weight_decay = ("B_bias", "C_bias", "D")

    def __init__(self, options: Mamba3Options, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, size, d_model = options.num_heads, options.state_size, sizes.hidden_size
        assert heads is not None
        self.build(heads, size, options.head_dim, None, key_heads=options.num_groups)
        inner = heads * options.head_dim
        self.gate_proj = nn.Linear(d_model, inner, bias=False)
        self.dt_proj = nn.Linear(d_model, heads, bias=False)
        self.decay_proj = nn.Linear(d_model, heads, bias=False)
        self.blend_proj = nn.Linear(d_model, heads, bias=False)
        self.angle_proj = nn.Linear(d_model, options.pairs, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.B_bias = nn.Parameter(torch.empty(heads, size))
        self.C_bias = nn.Parameter(torch.empty(heads, size))
        self.D = nn.Parameter(torch.empty(heads))
        self.B_norm, self.C_norm = (build_norm("rmsnorm", size, sizes.norm_eps) for _ in "BC")
        self.norm = GroupedRMSNorm(heads, inner, sizes.norm_eps) if options.output_norm else None

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return two groups, half rotated; odd sizes, all rotated, with a norm."""
        return [
            {"head_dim": 8, "state_size": 8, "num_heads": 4, "num_groups": 2},
            {"head_dim": 5, "state_size": 7, "num_heads": 3, "rotated": 1.0, "output_norm": True},
        ]

    def init_parameters(self, std: float) -> None:
        """Draw time steps log-uniformly; set D and both biases to 1."""
        o = self.options
        init_time_step(self.dt_bias, o.dt_min, o.dt_max, o.dt_floor)
        for parameter in (self.B_bias, self.C_bias, self.D):
            init.ones_(parameter)

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        C, B, u = self.project(x, cu_seqlens, cache)
        C, B = self.C_norm(C), self.B_norm(B)
        dt = F.softplus(to_float32(self.dt_proj(x)) + to_float32(self.dt_bias))
        rate = F.softplus(to_float32(self.decay_proj(x))).clamp(min=self.options.decay_floor)
        blend = torch.sigmoid(to_float32(self.blend_proj(x)))
        log_decay, own = -dt * rate, blend * dt
        earlier = token_before(torch.cat([B.flatten(2), u.flatten(2)], -1), cu_seqlens, cache)
        B_before, u_before = earlier.split([B.shape[2] * self.key_dim, u.shape[2] * u.shape[3]], -1)
        own_before = token_before(own, cu_seqlens, cache, state="conv_step")
        step = dt.unsqueeze(-1) * to_float32(self.angle_proj(x)).unsqueeze(2)
        angle, last = running_angle(step, cu_seqlens)
        C, B = self._biased(C, self.C_bias), self._biased(B, self.B_bias)
        B_before = self._biased(B_before.unflatten(-1, (-1, self.key_dim)), self.B_bias)
        y = self.recur(
            rotate(C, angle), rotate(B_before, angle - step), u_before.view_as(u), cu_seqlens, cache,
            carry=lambda state: rotate_state(state, -last), log_decay=log_decay,
            write_scale=log_decay.exp() * (own_before + (1 - blend) * dt),
        )  # fmt: skip
        weight = own * (to_float32(C) * B).sum(-1) + to_float32(self.D)
        y = (y + weight.unsqueeze(-1) * u).to(u.dtype).flatten(-2)
        return self.o_proj((y if self.norm is None else self.norm(y)) * F.silu(self.gate_proj(x)))

    def _biased(self, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Add a bias per head: (B, T, G, N) -> (B, T, H, N)."""
        return y.repeat_interleave(self.num_heads // y.shape[2], dim=2) + bias.to(y.dtype)

    def mixing_flops(self, context: int) -> float:
        """Count the recurrence, and the present token's weight and value."""
        present = self.key_dim + self.value_dim
        return super().mixing_flops(context) + 2.0 * self.num_heads * present

    def states(self) -> dict[str, StateSpec]:
        """Return one N x P state per head; B, x and the weight of the previous token."""
        inner = self.key_heads * self.key_dim + self.num_heads * self.value_dim
        return {
            **super().states(),
            "conv": StateSpec((inner, 1)),
            "conv_step": StateSpec((self.num_heads, 1), torch.float32),
        }
