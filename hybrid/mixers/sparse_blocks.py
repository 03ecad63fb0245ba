"""Compressed and selected branches of native sparse attention (arXiv 2502.11089, section 3.3).

Keys are columns of a grid: compressed block c covers columns [c d, c d + l), selection block j covers
[j l', (j + 1) l'). Every document starts at a multiple of l', so that all documents of a row use one
grid. Queries are processed in small steps, so that memory grows only with the number of keys.

Shapes: B batch, T queries, S columns, H query heads, H_kv key heads, G = H / H_kv, K head dim,
C compressed blocks, J selection blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hybrid.mixers.parts import to_float32

# Maximum number of elements held by one step over queries. It determines the queries per step.
_BUDGET = 2**24


@dataclass(frozen=True)
class Blocks:
    """Block sizes in tokens, and numbers of blocks.

    Attributes:
        size, stride: l and d of the compressed blocks; d divides l.
        select_size: l' of the selection blocks; d divides l'.
        selected: n, blocks that a query selects.
        initial: how many of the n are the first blocks of the document.
        local: how many of the n are the last blocks up to the query's own.
    """

    size: int
    stride: int
    select_size: int
    selected: int
    initial: int
    local: int

    def overlaps(self, like: torch.Tensor) -> torch.Tensor:
        """Return the number of strides shared by compressed block c and selection block j.

        The result is indexed by c - j l' / d, from 1 - l / d on. It counts the terms with
        c = j l' / d + m - n in the sum of eq. 9. (The printed equation has - m - n, which would count
        blocks before j.)
        """
        strides, narrow = self.select_size // self.stride, self.size // self.stride
        offset = torch.arange(1 - narrow, strides, device=like.device)
        shared = (offset + narrow).clamp(max=strides) - offset.clamp(min=0)
        return shared.to(like.dtype)


def sparse_attention(
    q: torch.Tensor,
    compressed: tuple[torch.Tensor, torch.Tensor],
    keys: tuple[torch.Tensor, torch.Tensor],
    column: torch.Tensor,
    base: torch.Tensor,
    blocks: Blocks,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to compressed blocks, and to the tokens of the blocks with the largest compressed weights.

    Args:
        q: (B, H, T, K).
        compressed: keys and values of the compressed blocks (B, H_kv, C, K).
        keys: keys and values of tokens (B, H_kv, S, K).
        column: (B, T), column of each query's own token.
        base: (B or 1, T), first column of its document, a multiple of l'.
        blocks: block sizes.
        scaling: factor of the logits.

    Returns:
        o of both branches, (B, T, H, K). The compressed one is 0 where no block is complete.
    """
    batch, heads, time, _ = q.shape
    q = q.unflatten(1, (keys[0].shape[1], -1))
    missing = -keys[0].shape[2] % blocks.select_size
    k, v = (F.pad(y, (0, 0, 0, missing)) for y in keys)
    base = base.expand(batch, time)
    tokens = blocks.selected * blocks.select_size
    share = k.shape[1] * tokens * 2 * k.shape[3] + heads * (tokens + 2 * compressed[0].shape[2])
    step = max(1, _BUDGET // max(1, batch * share))
    outputs = []
    for start in range(0, time, step):
        part = slice(start, start + step)
        inputs = (q[:, :, :, part], *compressed, k, v, column[:, part], base[:, part])
        if step < time and torch.is_grad_enabled():
            # do not save the selected keys for backward: they are many times larger than all keys
            outputs.append(checkpoint(_step, *inputs, blocks, scaling, use_reentrant=False))
        else:
            outputs.append(_step(*inputs, blocks, scaling))
    if not outputs:
        empty = q.new_empty(batch, 0, heads, v.shape[3])
        return empty, empty
    coarse, fine = (
        torch.cat(branch, dim=3).flatten(1, 2).transpose(1, 2)
        for branch in zip(*outputs, strict=True)
    )
    return coarse, fine


def _step(
    q: torch.Tensor,
    k_blocks: torch.Tensor,
    v_blocks: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    column: torch.Tensor,
    base: torch.Tensor,
    blocks: Blocks,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute both branches for q (B, H_kv, G, t, K); each o is (B, H_kv, G, t, K)."""
    start = blocks.stride * torch.arange(k_blocks.shape[2], device=q.device)
    visible = (start >= base[..., None]) & (start + blocks.size <= column[..., None] + 1)
    logits = to_float32(q @ k_blocks[:, :, None].mT) * scaling
    weights = masked_softmax(logits, visible[:, None, None])
    coarse = weights.to(v.dtype) @ v_blocks[:, :, None]
    chosen, real = select(weights.detach().sum(dim=2), column, base, blocks, k.shape[2])
    fine = _attend_selected(q, k, v, chosen, real, column, blocks, scaling)
    return coarse, fine


def masked_softmax(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the entries of the last dimension where ``mask`` is True; all zeros without any."""
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1) * mask


@torch.no_grad()
def select(
    weights: torch.Tensor, column: torch.Tensor, base: torch.Tensor, blocks: Blocks, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select blocks by the weights of the compressed blocks in them (eq. 9 to 11).

    Args:
        weights: (B, H_kv, T, C), summed over the heads of a group.
        column, base: (B, T), as in ``sparse_attention``.
        blocks: block sizes.
        columns: S, a multiple of l'.

    Returns:
        Indices of the blocks (B, H_kv, T, n), ascending, and a bool mask of the valid ones.
    """
    ratio, total = blocks.select_size // blocks.stride, columns // blocks.select_size
    left = blocks.size // blocks.stride - 1
    padded = F.pad(weights, (left, total * ratio - weights.shape[3]))
    kernel = blocks.overlaps(weights)
    score = (padded.unfold(3, len(kernel), ratio) * kernel).sum(dim=-1)
    number = torch.arange(total, device=weights.device)
    own, first = (y[..., None] // blocks.select_size for y in (column, base))
    forced = (number < first + blocks.initial) | (number > own - blocks.local)
    visible = (number >= first) & (number <= own)
    score = score.masked_fill(forced[:, None], float("inf"))
    score = score.masked_fill(~visible[:, None], float("-inf"))
    best = score.topk(min(blocks.selected, total), dim=-1)
    # sort, so that blocks outside the mask cannot change the order of a sum
    chosen, order = best.indices.sort(dim=-1)
    return chosen, best.values.gather(-1, order) > float("-inf")


def _attend_selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    real: torch.Tensor,
    column: torch.Tensor,
    blocks: Blocks,
    scaling: float,
) -> torch.Tensor:
    """Attend from q (B, H_kv, G, t, K) to the tokens of its blocks (B, H_kv, t, n), up to its own."""
    within = torch.arange(blocks.select_size, device=q.device)
    place = (chosen[..., None] * blocks.select_size + within).flatten(3)  # (B, H_kv, t, n l')
    seen = real.repeat_interleave(blocks.select_size, dim=3) & (place <= column[:, None, :, None])
    k, v = (
        y.gather(2, place.flatten(2)[..., None].expand(-1, -1, -1, y.shape[3])).unflatten(
            2, place.shape[2:]
        )
        for y in (k, v)
    )
    logits = to_float32(torch.einsum("bhgtk,bhtsk->bhgts", q, k)) * scaling
    weights = masked_softmax(logits, seen[:, :, None])
    return torch.einsum("bhgts,bhtsk->bhgtk", weights.to(v.dtype), v)
