"""Dual chunk attention: inference on long sequences with positions seen in training.

Positions are split into chunks of s tokens (arXiv 2402.17463). A key at position p has the rotary
position p mod s. A query has three rotary positions, selected by the distance in chunks to the key:

    same chunk      p mod s                          true distances, below s
    chunk before    min(p mod s + s, s + w - 1)      true distances for the first w queries of a chunk
    further back    s + w - 1

No distance exceeds s + w - 1, which is the paper's c - 1 with w = c - s.

Shapes: B batch, T queries, S keys, H query heads, H_kv key heads, K head dim, R rotated dims.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hybrid.mixers.attention import causal_mask, weighted_values
from hybrid.mixers.parts import to_float32
from hybrid.nn.rotary import RotaryEmbedding, rotate

Angles = tuple[torch.Tensor, torch.Tensor]

CHUNK_MARKS = 2  # numbers per key that store the index of its chunk
_BASE = 256  # the chunk is _BASE * high + low, both exact in bfloat16 up to 65,535
_QUERIES = 128  # queries per step, so that memory grows with S and not with T S


class DualChunkAngles(NamedTuple):
    """cos and sin (B, T, R) of the three rotary positions of each token, and its chunk (B, T)."""

    same: Angles
    before: Angles
    further: Angles
    chunk: torch.Tensor

    def rotate(self, q: torch.Tensor, k: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Rotate q (B, H, T, K) to its three positions, and k (B, H_kv, T, K) to its one."""
        queries = [rotate(q, *angles) for angles in (self.same, self.before, self.further)]
        return queries, rotate(k, *self.same)


class DualChunkRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding of dual chunk attention: plain in training, ``DualChunkAngles`` at inference.

    Args:
        rope_parameters, head_dim, max_position_embeddings: as in ``RotaryEmbedding``.
        chunk_size: s.
        window: w.
    """

    def __init__(
        self,
        rope_parameters: dict[str, Any],
        head_dim: int,
        max_position_embeddings: int | None,
        chunk_size: int,
        window: int,
    ) -> None:
        super().__init__(rope_parameters, head_dim, max_position_embeddings)
        self.chunk_size, self.window = chunk_size, window

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Angles | DualChunkAngles:
        """Return the angles of x (B, T, D) at position_ids (B, T)."""
        if self.training:
            return super().forward(x, position_ids)
        place = position_ids % self.chunk_size
        last = self.chunk_size + self.window - 1
        before = (place + self.chunk_size).clamp(max=last)
        roles = [place, before, torch.full_like(place, last)]
        same, before, further = (super(DualChunkRotaryEmbedding, self).forward(x, p) for p in roles)
        chunk = torch.div(position_ids, self.chunk_size, rounding_mode="floor")
        return DualChunkAngles(same, before, further, chunk)


def mark_chunks(k: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """Append the chunk (B or 1, T) of each key to k (B, H_kv, T, K) as ``CHUNK_MARKS`` extra dims."""
    high = torch.div(chunk, _BASE, rounding_mode="floor")
    marks = torch.stack([high, chunk - _BASE * high], dim=-1).to(k.dtype)
    return torch.cat([k, marks[:, None].expand(*k.shape[:3], CHUNK_MARKS)], dim=-1)


def read_chunks(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert ``mark_chunks``: return keys (B, H_kv, S, K) and their chunks (B, S)."""
    marks = k[:, 0, :, -CHUNK_MARKS:].long()
    return k[..., :-CHUNK_MARKS], _BASE * marks[..., 0] + marks[..., 1]


def dual_chunk_attention(
    queries: list[torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    query_chunk: torch.Tensor,
    key_chunk: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """Softmax attention that rotates each query by its distance in chunks to the key.

    Args:
        queries: three tensors (B, H, T, K), as returned by ``DualChunkAngles.rotate``.
        k, v: (B, H_kv, S, K).
        query_chunk, key_chunk: (B or 1, T) and (B, S).
        mask, scaling, soft_cap, sinks: as in ``capped_attention``.

    Returns:
        o (B, T, H, K), and None in place of weights.
    """
    groups = queries[0].shape[1] // k.shape[1]
    k, v = (y.repeat_interleave(groups, dim=1) if groups > 1 else y for y in (k, v))
    time, keys = queries[0].shape[2], k.shape[2]
    if mask is None:
        mask = causal_mask(time, keys, k.device)
    outputs = []
    for start in range(0, time, _QUERIES):
        rows = slice(start, start + _QUERIES)
        apart = query_chunk[:, None, rows, None] - key_chunk[:, None, None]
        same, before, further = (to_float32(q[:, :, rows] @ k.mT) * scaling for q in queries)
        logits = torch.where(apart == 0, same, torch.where(apart == 1, before, further))
        part = mask[..., rows, :keys]
        outputs.append(weighted_values(logits, v, part, soft_cap=soft_cap, sinks=sinks)[0])
    return torch.cat(outputs, dim=1), None
