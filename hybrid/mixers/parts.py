"""Building blocks shared by several linear mixers.

Shapes: B batch, T time, H heads, K key dim, V value dim, D model dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.declare import Size
from hybrid.config.sizes import Sizes
from hybrid.mixers.base import MixerOptions, head_problems, nearest_divisors
from hybrid.mixers.linear_mixer import MAX_HEAD_DIM, value_parts
from hybrid.nn.norms import rms_norm
from hybrid_kernels import causal_conv1d

if TYPE_CHECKING:
    from hybrid.nn.past import Slot


def to_float32(x: torch.Tensor) -> torch.Tensor:
    """Convert x to float32, the lowest precision of gates; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class HeadOptions(MixerOptions):
    """Sizes of most linear mixers; subclasses set the defaults of their paper.

    Attributes:
        num_heads: H; default D / ``width``, at least 1.
        head_dim: key dim K; default ``key_share`` * D / H.
        value_head_dim: value dim V; default ``value_share`` * D / H. If only one of K and V is set, the
            other follows from the ratio of the two shares.
    """

    num_heads: Size | None = None
    head_dim: Size | None = None
    value_head_dim: Size | None = None

    width: ClassVar[int] = 64
    key_share: ClassVar[float] = 1.0
    value_share: ClassVar[float] = 1.0

    def complete(self, hidden_size: int) -> HeadOptions:
        """Return these options with heads and dims filled in."""
        keys, values = self.head_dim, self.value_head_dim
        slot: float = self.width
        if self.num_heads is not None:
            slot = hidden_size // max(1, self.num_heads)
        if values is not None:
            slot = values / self.value_share
        elif keys is not None:
            slot = keys / self.key_share
        heads = self.num_heads
        if heads is None:
            heads = max(1, int(hidden_size // max(1.0, slot)))
            if keys is None and values is None:
                slot = hidden_size // heads
        keys = max(1, int(self.key_share * slot)) if keys is None else keys
        values = max(1, int(self.value_share * slot)) if values is None else values
        return replace(self, num_heads=heads, head_dim=keys, value_head_dim=values)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, K, V of completed options."""
        assert self.num_heads is not None
        assert self.head_dim is not None
        assert self.value_head_dim is not None
        return self.num_heads, self.head_dim, self.value_head_dim

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes and each size that the op does not support."""
        done = self.complete(sizes.hidden_size)
        assert done.num_heads is not None
        lines = []
        if self.head_dim is None and self.value_head_dim is None:
            lines = head_problems(sizes.hidden_size, done.num_heads)
        return lines or too_wide(head_dim=done.head_dim) + _uneven(done.value_head_dim)


def too_wide(**dims: int | None) -> list[str]:
    """Return an error line for each head dim above the maximum of the op."""
    return [
        f"{name}: expected at most {MAX_HEAD_DIM}, got {dim}; try more heads"
        for name, dim in dims.items()
        if dim is not None and dim > MAX_HEAD_DIM
    ]


def step_problems(dt_min: float, dt_max: float) -> list[str]:
    """Return an error line if the range of initial time steps is empty."""
    return [f"dt_min: expected at most dt_max {dt_max}, got {dt_min}"] if dt_min > dt_max else []


def divides(name: str, part: int, whole_name: str, whole: int) -> list[str]:
    """Return an error line if ``part`` does not divide ``whole``."""
    if whole % part == 0:
        return []
    near = nearest_divisors(whole, part)
    return [f"{name}: expected a divisor of {whole_name} {whole}, got {part}; try {near}"]


def low_rank(d_in: int, rank: int, d_out: int, bias: bool = False) -> nn.Sequential:
    """Return the low-rank map x W_1 W_2 (+ b), with W_1 (D_in, rank) and W_2 (rank, D_out)."""
    return nn.Sequential(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=bias))


def token_before(
    x: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    cache: Slot | None,
    state: str = "conv",
) -> torch.Tensor:
    """Return x_{t-1} for x (B, T, D), with zeros at the start of each document.

    This is a convolution with the taps 1, 0. The last token is stored under the name ``state``.
    """
    taps = torch.tensor([[1.0, 0.0]], dtype=x.dtype, device=x.device).expand(x.shape[-1], 2)
    before, last = causal_conv1d(
        x,
        taps.contiguous(),
        initial_state=None if cache is None else cache.state(state),
        cu_seqlens=cu_seqlens,
        output_final_state=cache is not None,
    )
    if cache is not None and last is not None:
        cache.set_state(state, last)
    return before


def l2_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Compute x / sqrt(|x|^2 + eps) over the last dimension, in float32 or float64."""
    y = to_float32(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def softplus_log_decay(
    step: torch.Tensor, dt_bias: torch.Tensor, a_log: torch.Tensor
) -> torch.Tensor:
    """Compute -exp(A_log) * softplus(step + dt_bias), Mamba's log decay (arXiv 2312.00752, eq. 4).

    The arguments are broadcast. The result is float32, or float64 if an argument is.
    """
    return -to_float32(a_log).exp() * F.softplus(to_float32(step) + to_float32(dt_bias))


def init_time_step(
    dt_bias: torch.Tensor, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4
) -> None:
    """Draw softplus(dt_bias) log-uniformly from [dt_min, dt_max] (arXiv 2312.00752, section 3.6)."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(low, high).exp_()
    dt = dt.clamp_(min=dt_floor)
    init.copy_(dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def init_log_uniform(a_log: torch.Tensor, low: float, high: float) -> None:
    """Draw exp(A_log) uniformly from [low, high]."""
    init.copy_(a_log, torch.empty_like(a_log, dtype=torch.float32).uniform_(low, high).log_())


class _GroupedNorm(nn.Module):
    """Norm within each of G equal groups of channels, with one weight per channel."""

    def __init__(self, groups: int, channels: int, eps: float, bias: bool = False) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., G, channels / G) over the last dimension."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., channels)."""
        y = self.normalize(x.unflatten(-1, (self.groups, -1))).flatten(-2) * self.weight
        return y if self.bias is None else y + self.bias


def _uneven(value_dim: int | None) -> list[str]:
    """Return an error line for values too wide for the op that cannot be split into equal parts."""
    parts = value_parts(value_dim or 1)
    if value_dim is None or value_dim % parts == 0:
        return []
    return [
        f"value_head_dim: expected a multiple of {parts} above {MAX_HEAD_DIM}, got {value_dim}; try"
        f" {value_dim - value_dim % parts} or {value_dim - value_dim % parts + parts}"
    ]


class GroupedRMSNorm(_GroupedNorm):
    """RMSNorm within each group (Mamba-2, arXiv 2405.21060, section 7.1)."""

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Divide by the root mean square."""
        return rms_norm(x, None, self.eps)


class GroupedLayerNorm(_GroupedNorm):
    """LayerNorm within each group: GroupNorm over channels, with channels in the last dimension."""

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Subtract the mean and divide by the standard deviation."""
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm(o) * act(gate) per head, with one weight for all heads (Gated DeltaNet, KDA, GLA)."""

    def __init__(self, value_dim: int, eps: float, activation: str = "silu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(value_dim))
        self.eps, self.activation = eps, activation

    def forward(self, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """Map o (B, T, H, V) and gate (B, T, H * V), or None for no gate, to (B, T, H * V)."""
        y = rms_norm(o, self.weight, self.eps).flatten(-2)
        if gate is None:
            return y
        act = F.silu if self.activation == "silu" else torch.sigmoid
        return (y * act(to_float32(gate))).to(o.dtype)


def plain_weight(linear: nn.Module) -> torch.Tensor | None:
    """Return the weight (D_out, D_in) of a plain Linear without bias; None if it is not plain.

    A module is not plain if calling it does more than a matrix product, or if its weight is not stored
    as used: adapters, parametrizations, quantization, hooks (offloading, pruning), shards. Call the
    module in that case.
    """
    if type(linear) is not nn.Linear or linear.bias is not None or "forward" in vars(linear):
        return None
    if linear._forward_hooks or linear._forward_pre_hooks:
        return None
    weight = linear.weight
    plain = type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta
    return weight if plain and weight.shape == (linear.out_features, linear.in_features) else None
