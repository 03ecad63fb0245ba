"""Norms by name, all of them torch's own."""

from __future__ import annotations

from typing import Literal

from torch import nn

NormName = Literal["rmsnorm", "layernorm"]


def build_norm(name: NormName, size: int, eps: float) -> nn.Module:
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over a last dimension of `size`."""
    return nn.RMSNorm(size, eps=eps) if name == "rmsnorm" else nn.LayerNorm(size, eps=eps)
