"""Mamba-2: a scalar decay from a softplus time step (arXiv 2405.21060).

Shapes: B batch, T time, H heads, G groups, N state size (the key dim), P head dim (the value dim).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.block_options import scaled
from hybrid.config.declare import Limits, Positive, Range, Size, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.base import MixerOptions
from hybrid.mixers.linear_mixer import LinearMixer
from hybrid.mixers.parts import (
    GroupedRMSNorm,
    divides,
    init_log_uniform,
    init_time_step,
    step_problems,
    to_float32,
    too_wide,
)
from hybrid.nn.past import Slot


@dataclass(frozen=True)
class Mamba2Options(MixerOptions):
    """Options of ``mamba2``.

    Attributes:
        num_heads: H; default expand * D / head_dim, at least 1.
        head_dim: P, the value dim of a head.
        state_size: N, the key dim of a head.
        num_groups: G, groups of heads that share B and C; must divide H.
        expand: ratio of the inner width H * P to D, used if num_heads is null.
        conv_size: width of the short convolution on x, B, C; null for no convolution.
        conv_bias: add a bias to the convolution.
        bias: add biases to the projections.
        skip: add D_h * x to the output of head h.
        output_norm: ``gated``: RMSNorm(y * silu(z)) (Mamba-2). ``gated_after``: RMSNorm(y) * silu(z).
            ``none``: y * silu(z) (some Falcon-H1 models).
        norm_groups: number of groups of channels that are normalised separately; default G.
        dt_min, dt_max, dt_floor: range of the initial time steps, drawn log-uniformly, and their floor.
        dt_limit: [low, high], bounds of the time steps; null for no bounds.
        a_range: [low, high], range of the initial rates A, drawn uniformly.
        projection_multipliers: five factors of the parts z, x, B, C, dt of the input projection
            (``ssm_multipliers`` of Falcon-H1, arXiv 2507.22448); null for none.
    """

    num_heads: Size | None = None
    head_dim: Size = 64
    state_size: Size = 128
    num_groups: Size = 1
    expand: Positive = 2.0
    conv_size: Size2 | None = 4
    conv_bias: bool = True
    bias: bool = False
    skip: bool = True
    output_norm: Literal["gated", "gated_after", "none"] = "gated"
    norm_groups: Size | None = None
    dt_min: Positive = 1e-3
    dt_max: Positive = 0.1
    dt_floor: Positive = 1e-4
    dt_limit: Limits | None = None
    a_range: Range = (1.0, 16.0)
    projection_multipliers: Annotated[list[float], Field(min_length=5, max_length=5)] | None = None

    def complete(self, hidden_size: int) -> Mamba2Options:
        """Return these options with heads and the groups of the norm filled in."""
        heads = self.num_heads
        if heads is None:
            heads = max(1, int(self.expand * hidden_size) // max(1, self.head_dim))
        groups = self.num_groups if self.norm_groups is None else self.norm_groups
        return replace(self, num_heads=heads, norm_groups=groups)

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes."""
        lines = too_wide(head_dim=self.head_dim, state_size=self.state_size)
        if not lines:
            done = self.complete(sizes.hidden_size)
            assert done.num_heads is not None
            assert done.norm_groups is not None
            inner = done.num_heads * done.head_dim
            lines += divides("num_groups", done.num_groups, "num_heads", done.num_heads)
            lines += divides("norm_groups", done.norm_groups, "num_heads * head_dim", inner)
        return lines + step_problems(self.dt_min, self.dt_max)


@register_mixer("mamba2", symbol="M")
class Mamba2(LinearMixer):
    """Mamba-2 mixer (arXiv 2405.21060, eq. 1 and section 7.1).

    S_t = exp(-dt_t exp(A_log)) S_{t-1} + B_t (dt_t x_t)^T, y_t = C_t^T S_t + D x_t.

    dt_t = softplus(x W_dt + dt_bias), one per head. A short convolution and SiLU apply to x, B, C. The
    output is RMSNorm(y * silu(z)). C, B, x and dt are the op's q, k, v and ``write_scale``. The
    published input projection [z, x, B, C, dt] is split into five matrices: ``gate_proj``, ``v_proj``,
    ``k_proj``, ``q_proj``, ``dt_proj``.
    """

    Options = Mamba2Options
    paper = "arXiv 2405.21060"
    formula = "G_t = gamma_t 1^T 1, gamma_t = exp(-softplus(x_t W_dt + b) exp(A_log))"
    used_by = "Mamba-2, Nemotron-H, Granite-4.0-H, Bamba, Zamba2, Falcon-H1"

    def __init__(self, options: Mamba2Options, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, head_dim, groups = options.num_heads, options.head_dim, options.num_groups
        assert heads is not None
        assert options.norm_groups is not None
        self.build(
            heads,
            options.state_size,
            head_dim,
            options.conv_size,
            options.bias,
            key_heads=groups,
            conv_bias=options.conv_bias,
            conv_activation="silu",
        )
        parts = options.projection_multipliers or [1.0] * 5
        self.multipliers = dict(zip(("z", "x", "B", "C", "dt"), parts, strict=True))
        inner = heads * head_dim
        self.gate_proj = nn.Linear(sizes.hidden_size, inner, bias=options.bias)
        self.dt_proj = nn.Linear(sizes.hidden_size, heads, bias=options.bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads)) if options.skip else None
        self.norm = None
        if options.output_norm != "none":
            self.norm = GroupedRMSNorm(options.norm_groups, inner, sizes.norm_eps)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return two groups with separate norms; limits and biases, no convolution and skip."""
        return [
            {"head_dim": 8, "state_size": 6, "num_heads": 4, "num_groups": 2},
            {"head_dim": 4, "state_size": 5, "num_heads": 3, "conv_size": None, "skip": False,
             "bias": True, "output_norm": "gated_after", "norm_groups": 3, "dt_limit": [0.01, 0.5],
             "projection_multipliers": [0.5, 2.0, 1.5, 0.7, 0.3]},
        ]  # fmt: skip

    def init_parameters(self, std: float) -> None:
        """Draw time steps log-uniformly from [dt_min, dt_max], A uniformly from a_range; set D to 1."""
        o = self.options
        init_time_step(self.dt_bias, o.dt_min, o.dt_max, o.dt_floor)
        init_log_uniform(self.A_log, *o.a_range)
        if self.D is not None:
            init.ones_(self.D)

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        C, B, u = self.project(x, cu_seqlens, cache)
        step = scaled(self.dt_proj(x), self.multipliers["dt"])
        dt = F.softplus(to_float32(step) + to_float32(self.dt_bias))
        if self.options.dt_limit is not None:
            dt = dt.clamp(*self.options.dt_limit)
        log_decay = -dt * to_float32(self.A_log).exp()
        y = self.recur(C, B, u, cu_seqlens, cache, log_decay=log_decay, write_scale=dt)
        if self.D is not None:
            y = y + u * self.D.to(u.dtype).unsqueeze(-1)
        z = scaled(self.gate_proj(x), self.multipliers["z"])
        return self.o_proj(self._gate(y.flatten(-2), F.silu(z)))

    def read_in(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return C, B and x after the projection, with their multipliers applied."""
        C, B, u = super().read_in(x)
        by = self.multipliers
        return scaled(C, by["C"]), scaled(B, by["B"]), scaled(u, by["x"])

    def project(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return C, B (B, T, G, N) and x (B, T, H, P); SiLU applies without a convolution, too."""
        C, B, u = super().project(x, cu_seqlens, cache)
        return (C, B, u) if self.conv is not None else (F.silu(C), F.silu(B), F.silu(u))

    def _gate(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if self.norm is None:
            return y * z
        return self.norm(y) * z if self.options.output_norm == "gated_after" else self.norm(y * z)
