"""Memory for the gradients of the chunked op, and their way back to the shapes of the inputs.

Shapes: B batch, T time, H heads, C chunk, G heads of q and k, r value heads per G, K key dim,
V value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.arguments import LinearAttention
from hybrid_kernels.chunked.inputs import InputChunks
from hybrid_kernels.custom_ops import Wanted
from hybrid_kernels.fused_qkv_grad import Places


class ChunkGradients(NamedTuple):
    """Gradients in chunks, to be filled, in the shapes of ``InputChunks``; None if not wanted.

    ``bonus`` (G, K) is added to.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_decay: Tensor | None = None
    value_decay: Tensor | None = None
    beta: Tensor | None = None
    write_scale: Tensor | None = None
    erase_key: Tensor | None = None
    erase_query: Tensor | None = None
    bonus: Tensor | None = None

    @property
    def of_decays(self) -> bool:
        """Whether the gradient of a decay is wanted."""
        return self.key_decay is not None or self.value_decay is not None

    def span(self, lead: slice) -> ChunkGradients:
        """Return the part of one span."""
        *by_token, bonus = self
        return ChunkGradients(*[None if x is None else x[lead] for x in by_token], bonus)


class GradientMemory:
    """Memory for the gradients of ``InputChunks``.

    Args:
        x: the inputs in chunks.
        wanted: names of the inputs whose gradients are wanted.
        places: how q, k and v lie in one tensor, if their gradients are to be in one as well.

    Attributes:
        chunks: views of it by chunk.
    """

    def __init__(self, x: InputChunks, wanted: Wanted, places: Places | None):
        decays = x.dtype if wanted & {"log_decay", "value_log_decay"} else None
        dtypes = {
            "key_decay": decays,
            "value_decay": decays,
            "beta": None if x.beta is None else x.beta.dtype,
            "write_scale": x.dtype,
            **{
                n: y.dtype for n in ("erase_key", "erase_query") if (y := getattr(x, n)) is not None
            },
        }
        self.plan, self._whole, chunks = x.plan, {}, {}
        if places is None:
            dtypes |= {name: getattr(x, name).dtype for name in "qkv"}
        else:
            self._whole["q"], rows = x.plan.empty((places.row,), x.q.dtype, x.q.device)
            chunks = dict(zip("qkv", (y.transpose(2, 3) for y in places.cut(rows)), strict=True))
            chunks["v"] = chunks["v"].unsqueeze(4)
        for name, dtype in dtypes.items():
            like = getattr(x, name)
            if like is not None and dtype is not None:
                shape = like.shape[2:3] + like.shape[4:]
                self._whole[name], view = x.plan.empty(shape, dtype, like.device)
                chunks[name] = view.transpose(2, 3)
        if x.bonus is not None:
            self._whole["bonus"] = chunks["bonus"] = torch.zeros_like(x.bonus, dtype=x.dtype)
        self.chunks = ChunkGradients(**chunks)
        self._fused = places is not None

    def results(self, a: LinearAttention) -> dict[str, Tensor]:
        """Return the gradients of the inputs by name, but for those of the initial states.

        With ``places``, that of q is (B, T, row), for q, k and v.
        """
        by_name = dict(self._whole)
        keys, values = by_name.pop("key_decay", None), by_name.pop("value_decay", None)
        # A scalar decay went with the values or with the keys.
        by_name["log_decay"] = values if keys is None else keys
        by_name["value_log_decay"] = values
        inputs, results = a.floating(), {}
        for name, grad in by_name.items():
            if name not in inputs or grad is None:
                continue
            by_token = grad if name == "bonus" else self.plan.result(grad)
            fused = name == "q" and self._fused
            results[name] = by_token if fused else like_input(inputs[name], by_token)
        return results


def fuse(places: Places, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the gradients of q, k and v into one tensor, under the name of q."""
    q = grads["q"]
    rows = q.new_empty(*q.shape[:2], places.row)
    for part, name in zip(places.cut(rows), "qkv", strict=True):
        part.copy_(grads[name])
    return {**grads, "q": rows}


def like_input(x: Tensor, grad: Tensor) -> Tensor:
    """Bring a gradient per token and per head to the shape and dtype of its input."""
    if x.dim() == 1:
        grad = grad.reshape(-1, x.shape[0]).sum(0)
    elif x.dim() == 4 and grad.numel() != x.numel():
        grad = grad.reshape(*x.shape[:3], -1, x.shape[3]).sum(3)
    return grad.reshape(x.shape).to(x.dtype)
