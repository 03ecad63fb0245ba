"""Buffers that stay in float32 when the model is cast to a lower precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


class Float32Buffers(nn.Module):
    """Mixin: `model.to(torch.bfloat16)` moves these buffers but does not round them.

    A decay or a rotary frequency is raised to the power of a position; in bfloat16, with its 8 bits,
    positions a few hundred apart would be told apart no longer.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            moved = getattr(self, name)
            if moved.dtype != kept.dtype:
                setattr(self, name, kept.to(moved.device))
        return self
