"""Norms by name, torch's own where it has them; and RMSNorm with a backward pass for CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.fields import NormName


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, eq. 4).

    torch's own, but on a CPU, where that has no backward kernel: it goes back through each of the
    operations it is made of, at several times the cost.

    Args:
        x: (..., size).
        weight: (size,), of x's dtype; None for none.
        eps: added to the mean square.
    """
    if _wants_own_backward(x, weight):
        return _RMSNormOnCPU.apply(x, weight, eps)[0]
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _wants_own_backward(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether there will be a backward pass on a CPU that no compiler fuses."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if weight is None:
        return x.requires_grad
    return weight.dtype == x.dtype and (x.requires_grad or weight.requires_grad)


class _RMSNormOnCPU(torch.autograd.Function):
    """`rms_norm`, backward by the kernel that torch has for LayerNorm.

    With r = 1 / rms(x), h = weight * dy and means over the last dimension:

        RMSNorm's    dx = r h - r^3 x mean(h x)
        LayerNorm's  dx = r h - r^3 x mean(h x) - r mean(h)    of an input whose mean is 0

    and LayerNorm's is told that the mean is 0. Its weight's gradient is summed row after row, so that
    in float32 its relative error is 1e-6 for 4,096 rows, as LayerNorm's is (torch's RMSNorm: 1e-7).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # In torch's own order, so that the value is the same to the bit with and without a gradient.
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = x * scale
        return y if weight is None else y.mul_(weight), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        dy, wanted = grads[0], ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # for a second derivative
            return *_differentiable(x, weight, ctx.eps, dy, *wanted), None
        size = x.shape[-1]
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, [size], torch.zeros_like(scale), scale, weight, None, [*wanted, False]
        )
        if wanted[0]:
            sums = torch.mv(dy.reshape(-1, size), dy.new_ones(size) if weight is None else weight)
            dx.add_(sums.view_as(scale).mul_(scale).div_(size))
        return dx if wanted[0] else None, dweight if wanted[1] else None, None


def _differentiable(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    dy: torch.Tensor,
    for_x: bool,
    for_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of `rms_norm`, in operations that have derivatives themselves."""
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    h = dy if weight is None else dy * weight
    dx = scale * h - scale**3 * x * (h * x).mean(-1, keepdim=True) if for_x else None
    return dx, (dy * x * scale).flatten(0, -2).sum(0) if for_weight else None


class RMSNorm(nn.RMSNorm):
    """torch's; an input of another dtype than the weight's, as autocast has them, is converted.

    torch has no fused kernel for such a pair, and warns of it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size), in x's dtype."""
        assert self.eps is not None
        if self.weight is None or self.weight.dtype == x.dtype:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm(x.to(self.weight.dtype), self.weight, self.eps).to(x.dtype)


class ZeroCenteredRMSNorm(nn.Module):
    """x / rms(x) * (1 + w), w starting from 0, so that weight decay pulls towards 1 (Gemma, Qwen3-Next).

    Computed in float32 at least, the weight too.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def init_parameters(self, std: float) -> None:
        """Zeros."""
        init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1 + self.weight.to(wide)
        return rms_norm(x.to(wide), weight, self.eps).to(x.dtype)


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
