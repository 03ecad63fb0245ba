"""How the ops behave under autocast and under differentiation other than ``backward()``.

Autocast: the ops compute in the dtypes of their arguments and in float32, forward and backward;
inside them autocast is off.

Forward-mode AD, ``torch.func`` and second derivatives: custom ops have a backward formula only, and
PyTorch would return tangents of zero, or an internal error. They are refused with the alternative,
``backend="reference"``, which consists of plain tensor operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hybrid_kernels.arguments import Arguments

_REFERENCE = (
    'pass backend="reference", which supports it (a loop over time, slow), or use first derivatives '
    "by backward()"
)


_functorch_level = torch._C._functorch.maybe_current_level  # pyright: ignore
any_autocast = torch._C._is_any_autocast_enabled  # pyright: ignore[reportPrivateUsage]
_LIBRARY = torch.library.Library("hybrid_kernels", "FRAGMENT")


class TransformError(NotImplementedError):
    """A differentiation or batching transform that a backend does not support."""


def without_autocast(function: Callable) -> Callable:
    """Wrap a function of tensors, or of a record, to run with autocast off on their device."""

    @functools.wraps(function)
    def wrapped(*args: Any):
        first = args[0]
        tensor = first if isinstance(first, Tensor) else first.first
        device = tensor.device.type
        # Some devices, as "meta", have no autocast.
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return wrapped


def transformed() -> bool:
    """Whether forward-mode AD or a ``torch.func`` transform is in progress."""
    return (
        forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
        or _functorch_level() is not None
    )


def refuse_transforms(arguments: Arguments) -> None:
    """Raise if a tensor carries a tangent or is wrapped by a ``torch.func`` transform.

    Raises:
        TransformError: one does.
    """
    op, present = arguments.OP, arguments.floating().values()
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore
    # Under a compiler, wrapped tensors cannot be told apart.
    if torch.compiler.is_compiling() or any(wrapped(x) for x in present):
        raise TransformError(
            f"{op}: torch.func transforms (vmap, grad, jvp, jacrev, ...) are not supported by this "
            f"backend; {_REFERENCE}"
        )
    if forward_ad._current_level < 0:  # pyright: ignore[reportPrivateUsage]
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in present):
        raise TransformError(
            f"{op}: forward-mode AD is not supported by this backend; {_REFERENCE}"
        )


def first_derivatives_only(op: str, forward: Any, backward: Any) -> None:
    """Register clear errors for what the custom ops of a backend do not support.

    Args:
        op: name of the public op.
        forward: the custom op.
        backward: the custom op that computes its gradients.
    """

    def second(ctx: Any, *grads: Any):
        raise TransformError(
            f"{op}: second derivatives are not supported by this backend; {_REFERENCE}"
        )

    def batched(*args: Any):
        raise TransformError(f"{op}: vmap is not supported by this backend; {_REFERENCE}")

    backward.register_autograd(second)
    for custom in (forward, backward):
        custom.register_vmap(batched)
        # What ``torch.autograd.grad(..., is_grads_batched=True)`` meets.
        _LIBRARY.impl(custom._qualname, batched, "Batched")
