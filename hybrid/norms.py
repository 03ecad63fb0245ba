"""Norms by name, torch's own where it has them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

NormName = Literal["rmsnorm", "zero_centered_rmsnorm", "weightless_rmsnorm", "layernorm"]


class RMSNorm(nn.RMSNorm):
    """torch's; an input of another dtype than the weight's, as autocast has them, is converted.

    torch has no fused kernel for such a pair, and warns of it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size), in x's dtype."""
        if self.weight is None or self.weight.dtype == x.dtype:
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class ZeroCenteredRMSNorm(nn.Module):
    """x / rms(x) * (1 + w), w starting from 0, so that weight decay pulls towards 1 (Gemma, Qwen3-Next).

    Computed in float32 at least, the weight too.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def init_parameters(self) -> None:
        """Zeros."""
        init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1 + self.weight.to(wide)
        return F.rms_norm(x.to(wide), weight.shape, weight, self.eps).to(x.dtype)


def build_norm(name: NormName, size: int, eps: float) -> nn.Module:
    """A norm over a last dimension of `size`.

    Args:
        name: `rmsnorm` (arXiv 1910.07467), `zero_centered_rmsnorm` (its weight is 1 + w),
            `weightless_rmsnorm` (it has none), `layernorm` (arXiv 1607.06450).
        size: of the last dimension.
        eps: added to the mean square or the variance.
    """
    if name == "layernorm":
        return nn.LayerNorm(size, eps=eps)
    if name == "zero_centered_rmsnorm":
        return ZeroCenteredRMSNorm(size, eps)
    return RMSNorm(size, eps=eps, elementwise_affine=name == "rmsnorm")
