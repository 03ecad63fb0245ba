"""Gradients of q, k and v in one tensor.

One projection, or one convolution over all channels, returns q, k and v as parts of one tensor.
Autograd copies the gradients of such parts into one tensor. ``linear_attention`` writes them into
one tensor from the start, and ``split`` then needs no copy.

Shapes: B batch, T time, H heads, K key dim or any other size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Attribute of tensors that hold nothing but the gradients of the parts.
_MARK = "_hybrid_rows"


def split(x: Tensor, sizes: Sequence[int], dim: int = -1) -> tuple[Tensor, ...]:
    """Cut a tensor into parts (views), as ``torch.split`` does, and rejoin their gradients.

    A gradient of a part that a hook keeps may be a view of the gradient of x.

    Args:
        x: any shape.
        sizes: of the parts, which add up to ``x.shape[dim]``.
        dim: along which to cut.

    Raises:
        RuntimeError: the sizes do not add up (``torch.split``'s own).
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return x.split(list(sizes), dim)
    return _Split.apply(x, list(sizes), dim)


class _Split(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
        return x.split(sizes, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, ctx.sizes, ctx.dim = inputs
        ctx.shape = x.shape

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> tuple[Tensor, ...]:
        return dx.split(ctx.sizes, ctx.dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # A gradient that will be differentiated again must be a copy.
        copied = torch.is_grad_enabled() or torch.compiler.is_compiling()
        whole = None if copied else _rejoined(grads, ctx.shape, ctx.dim)
        return torch.cat(grads, ctx.dim) if whole is None else whole, None, None


def _rejoined(parts: Sequence[Tensor], shape: torch.Size, dim: int) -> Tensor | None:
    """Return the contiguous tensor of a shape that holds nothing but these parts, if there is one.

    Only memory allocated for these gradients counts (``Places.hand_out``): other memory, as behind
    ``torch.cat``, may hold another tensor's gradient as well.
    """
    first, strides = parts[0], _strides(shape)
    whole, offset = first._base, first.storage_offset()
    if whole is None or not getattr(whole, _MARK, False) or whole.numel() != shape.numel():
        return None
    for part in parts:
        if part._base is not whole or part.storage_offset() != offset or part.stride() != strides:
            return None
        offset += part.shape[dim] * strides[dim]
    return first.as_strided(shape, strides)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, size))
    return tuple(reversed(strides))


class Places(NamedTuple):
    """Where tensors (B, T, heads, size) lie in the rows of one (B, T, row).

    Attributes:
        row: numbers per token.
        blocks: of each tensor the offset in a row, the heads, the stride from one to the next, and
            the size of one.
    """

    row: int
    blocks: tuple[tuple[int, int, int, int], ...]

    def cut(self, rows: Tensor) -> list[Tensor]:
        """View (..., row) as (..., heads, size) for each tensor."""
        lead, strides, start = rows.shape[:-1], rows.stride()[:-1], rows.storage_offset()
        return [
            rows.as_strided((*lead, heads, size), (*strides, stride, 1), start + offset)
            for offset, heads, stride, size in self.blocks
        ]

    def hand_out(self, rows: Tensor) -> list[Tensor]:
        """Cut a tensor that holds nothing else; ``split`` can then use it without a copy."""
        setattr(rows, _MARK, True)
        return self.cut(rows)


def _have_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors have an address; traced and distributed ones do not."""
    return all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def places(*tensors: Tensor) -> Places | None:
    """Return how tensors (B, T, H, size) fill the rows of one; None if they do not."""
    if not _have_memory(tensors):
        return None
    first = tensors[0]
    (batch, time), row = first.shape[:2], first.stride(1)
    start = min(x.storage_offset() for x in tensors)
    address = first.untyped_storage().data_ptr()
    for x in tensors:
        steps = x.stride()
        apart = time > 1 and steps[1] == row and steps[3] == 1
        apart = apart and (batch == 1 or steps[0] == time * row)
        alike = x.shape[:3] == first.shape[:3] and x.dtype == first.dtype
        if not (apart and alike and x.untyped_storage().data_ptr() == address):
            return None
    blocks = tuple(
        (int(x.storage_offset() - start), x.shape[2], x.stride(2), x.shape[3]) for x in tensors
    )
    return Places(row, blocks) if _fill(row, blocks) else None


@lru_cache(maxsize=256)
def _fill(row: int, blocks: tuple[tuple[int, int, int, int], ...]) -> bool:
    """Whether the heads cover every number of a row once."""
    pieces = sorted(
        (offset + head * stride, size)
        for offset, heads, stride, size in blocks
        for head in range(heads)
    )
    end = 0
    for start, size in pieces:
        if start != end:
            return False
        end += size
    return end == row
