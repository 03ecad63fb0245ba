"""Buffers that stay in float32 when the model is cast to a lower precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


class Float32Buffers(nn.Module):
    """Mixin whose ``float32_buffers`` stay in float32 in ``model.to(torch.bfloat16)``.

    Decays and rotary frequencies are raised to the power of a position. bfloat16 has 8 bits of precision
    and could not distinguish positions a few hundred apart.
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
