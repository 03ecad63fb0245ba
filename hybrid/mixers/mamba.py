"""Mamba: a selective scan with a full matrix of decays (arXiv 2312.00752).

Shapes: B batch, T time, E inner width, N state size per channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.declare import Positive, Size, Size2
from hybrid.config.fields import NormName
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.base import MixerOptions, StateMixer
from hybrid.mixers.parts import init_time_step, step_problems, to_float32
from hybrid.mixers.short_convolution import ShortConvolution
from hybrid.nn.norms import build_norm
from hybrid.nn.past import Slot, StateSpec
from hybrid_kernels import selective_scan


@dataclass(frozen=True)
class MambaOptions(MixerOptions):
    """Options of ``mamba``.

    Attributes:
        inner_size: E; default 2 D.
        state_size: N.
        conv_size: width of the short convolution.
        conv_bias: add a bias to the convolution.
        bias: add biases to the input and output projections.
        dt_rank: rank of the map to the time step; default D / 16, rounded up.
        inner_norm: RMSNorm of the time step's input, of B and of C (Jamba); ``weightless``: without
            weights (Falcon-Mamba).
        inner_norm_eps: epsilon of those norms; default the model's ``norm_eps``.
        dt_min, dt_max, dt_floor: range of the initial time steps, drawn log-uniformly, and their floor.
    """

    inner_size: Size | None = None
    state_size: Size = 16
    conv_size: Size2 = 4
    conv_bias: bool = True
    bias: bool = False
    dt_rank: Size | None = None
    inner_norm: bool | Literal["weightless"] = False
    inner_norm_eps: Positive | None = None
    dt_min: Positive = 1e-3
    dt_max: Positive = 0.1
    dt_floor: Positive = 1e-4

    def complete(self, hidden_size: int) -> MambaOptions:
        """Return these options with the inner width and the rank filled in."""
        return replace(
            self,
            inner_size=2 * hidden_size if self.inner_size is None else self.inner_size,
            dt_rank=math.ceil(hidden_size / 16) if self.dt_rank is None else self.dt_rank,
        )

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for an empty range of time steps."""
        return step_problems(self.dt_min, self.dt_max)


@register_mixer("mamba", symbol="m")
class Mamba(StateMixer):
    """Mamba mixer (arXiv 2312.00752, algorithm 2 and section 3.4).

    h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t^T, y_t = h_t C_t + D u_t, with A = -exp(A_log) (E, N).

    u = silu(conv(x W_u)) and dt_t = softplus(u W_1 W_2 + b) per channel; B and C are linear in u. The
    output is y * silu(x W_z).
    """

    Options = MambaOptions
    paper = "arXiv 2312.00752"
    formula = "G_t = exp(-(1^T alpha_t) * exp(A)), alpha_t = softplus(x_t W_1 W_2 + b)"
    used_by = "Mamba, Falcon-Mamba, Jamba, Samba"
    no_weight_decay = ("A_log",)

    def __init__(self, options: MambaOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        inner, rank, states = options.inner_size, options.dt_rank, options.state_size
        assert inner is not None
        assert rank is not None
        self.in_proj = nn.Linear(sizes.hidden_size, 2 * inner, bias=options.bias)
        self.conv = ShortConvolution(inner, options.conv_size, options.conv_bias, "silu")
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.o_proj = nn.Linear(inner, sizes.hidden_size, bias=options.bias)
        self.splits = [rank, states, states]
        self.inner_norms = None
        if options.inner_norm:
            eps = sizes.norm_eps if options.inner_norm_eps is None else options.inner_norm_eps
            kind: NormName = "rmsnorm" if options.inner_norm is True else "weightless_rmsnorm"
            norms = [build_norm(kind, size, eps) for size in self.splits]
            self.inner_norms = nn.ModuleList(norms)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the options of the paper; Jamba's inner norms with biases; Falcon-Mamba's norms."""
        return [
            {"state_size": 5},
            {"inner_size": 24, "state_size": 4, "conv_size": 3, "conv_bias": False, "bias": True,
             "dt_rank": 3, "inner_norm": True},
            {"state_size": 3, "inner_norm": "weightless", "inner_norm_eps": 1e-3},
        ]  # fmt: skip

    def init_parameters(self, std: float) -> None:
        """Set A = -1, ..., -N in every channel (S4D-real) and D to 1; draw time steps log-uniformly."""
        o = self.options
        rates = torch.arange(1, o.state_size + 1, dtype=torch.float32)
        init.copy_(self.A_log, rates.log().expand_as(self.A_log))
        init.ones_(self.D)
        init.uniform_(self.dt_proj.weight, -(o.dt_rank**-0.5), o.dt_rank**-0.5)
        init_time_step(self.dt_proj.bias, o.dt_min, o.dt_max, o.dt_floor)

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv(u, cu_seqlens, cache)
        parts = self.x_proj(u).split(self.splits, dim=-1)
        if self.inner_norms is not None:
            parts = [norm(part) for norm, part in zip(self.inner_norms, parts, strict=True)]
        dt, B, C = parts
        before = None if cache is None else cache.state("recurrent")
        y, state = selective_scan(
            u,
            F.softplus(to_float32(self.dt_proj(dt))),
            -to_float32(self.A_log).exp(),
            B,
            C,
            to_float32(self.D),
            initial_state=before,
            cu_seqlens=cu_seqlens,
            output_final_state=cache is not None,
            overwrite_state=before is not None and not torch.is_grad_enabled(),
        )
        if cache is not None and state is not None:
            cache.set_state("recurrent", state)
        return self.o_proj(y * F.silu(z))

    def mixing_flops(self, context: int) -> float:
        """Count decay, write and read of an E x N state: 2 + 3 + 2 FLOPs per element."""
        return 7.0 * self.A_log.numel()

    def states(self) -> dict[str, StateSpec]:
        """Return the E x N state, and the last W - 1 inputs of the convolution."""
        recurrent = StateSpec(tuple(self.A_log.shape), torch.float32)
        return {"recurrent": recurrent, **self.conv.states()}
