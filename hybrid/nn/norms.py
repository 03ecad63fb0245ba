"""Norms by name, and an RMSNorm with a fast backward pass on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.fields import NormName


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, eq. 4).

    On a CPU, torch's RMSNorm has no backward kernel and is several times slower in backward. In that
    case a custom backward is used.

    Args:
        x: (..., size).
        weight: (size,), of x's dtype; None for no weight.
        eps: epsilon added to the mean square.

    Returns:
        (..., size), in x's dtype.
    """
    if _wants_own_backward(x, weight):
        return _RMSNormOnCPU.apply(x, weight, eps)[0]
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _wants_own_backward(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Return whether a backward pass will run on a CPU without a compiler."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if weight is None:
        return x.requires_grad
    return weight.dtype == x.dtype and (x.requires_grad or weight.requires_grad)


class _RMSNormOnCPU(torch.autograd.Function):
    """``rms_norm`` whose backward uses torch's kernel for LayerNorm.

    With r = 1 / rms(x), h = weight * dy and means over the last dimension:

        RMSNorm    dx = r h - r^3 x mean(h x)
        LayerNorm  dx = r h - r^3 x mean(h x) - r mean(h)    for an input with mean 0

    The kernel receives a mean of 0. The gradient of the weight is summed row by row, so that its
    relative error in float32 is 1e-6 for 4,096 rows, as for LayerNorm (torch's RMSNorm: 1e-7).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # In torch's order of operations, so that values are bitwise equal with and without gradients.
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
    """Compute the gradients of ``rms_norm`` with differentiable operations."""
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    h = dy if weight is None else dy * weight
    dx = scale * h - scale**3 * x * (h * x).mean(-1, keepdim=True) if for_x else None
    return dx, (dy * x * scale).flatten(0, -2).sum(0) if for_weight else None


class RMSNorm(nn.RMSNorm):
    """RMSNorm that converts its input if dtypes of input and weight differ, as under autocast.

    torch has no fused kernel for different dtypes and warns.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (..., size); the result has x's dtype."""
        assert self.eps is not None
        if self.weight is None or self.weight.dtype == x.dtype:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm(x.to(self.weight.dtype), self.weight, self.eps).to(x.dtype)


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm with the weight 1 + w, x / rms(x) * (1 + w), where w is initialised to 0.

    Weight decay then pulls the weight towards 1 (Gemma, Qwen3-Next). All is computed in float32, or
    float64 for float64 inputs.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def init_parameters(self, std: float) -> None:
        """Set w to zero."""
        init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (..., size); the result has x's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1 + self.weight.to(wide)
        return rms_norm(x.to(wide), weight, self.eps).to(x.dtype)


def build_norm(name: NormName, size: int, eps: float) -> nn.Module:
    """Return a norm over the last dimension.

    Args:
        name: ``rmsnorm`` (arXiv 1910.07467), ``zero_centered_rmsnorm`` (weight 1 + w),
            ``weightless_rmsnorm`` (no weight) or ``layernorm`` (arXiv 1607.06450).
        size: size of the last dimension.
        eps: epsilon added to the mean square or the variance.
    """
    if name == "layernorm":
        return nn.LayerNorm(size, eps=eps)
    if name == "zero_centered_rmsnorm":
        return ZeroCenteredRMSNorm(size, eps)
    return RMSNorm(size, eps=eps, elementwise_affine=name == "rmsnorm")
