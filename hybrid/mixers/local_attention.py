"""Softmax attention to a bounded number of earlier tokens: base of sliding windows and chunks.

Shapes: B rows, T tokens, P columns of earlier tokens, S = P + T, H query heads, H_kv key heads, K head
dim, W reach.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybrid.config.sizes import Sizes
from hybrid.mixers.attention import (
    CAPPED_FUNCTIONS,
    SoftmaxMixer,
    add_positions,
    capped_attention,
)
from hybrid.mixers.grouped_heads import GroupedHeadOptions, GroupedHeads
from hybrid.mixers.parts import to_float32
from hybrid.nn.local_rows import LocalRows, Reach
from hybrid.nn.packing import WHOLE_ROWS, Segments
from hybrid.nn.past import Slot, TokenSpec
from hybrid.nn.rotary import BY_LENGTH, ExactRotaryEmbedding, apply_rotary, build_rotary

Attended = tuple[torch.Tensor, torch.Tensor | None]

LEAST_BLOCK = 64


@dataclass(frozen=True)
class LocalAttentionOptions(GroupedHeadOptions):
    """Options of softmax mixers with a bounded reach: those of ``GroupedHeadOptions``."""

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes."""
        lines = super().problems(sizes)
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind in BY_LENGTH:
            lines.append(
                "rope_parameters.rope_type: expected a type that does not depend on the sequence length,"
                f" which a window does not see, got {kind!r}; try 'default' or 'yarn'"
            )
        return lines


class LocalAttention(GroupedHeads, SoftmaxMixer):
    """Base class of softmax attention over at most W tokens within reach.

    o_t = sum_s softmax_s(scale * q_t . k_s) v_s over the tokens s within reach of t.

    transformers' attention function (``attn_implementation``) receives the window as a keyword argument.
    Sdpa, and any function without support for the options, runs over blocks of queries with the keys
    within their reach: time and memory grow with T W. Eager attention returns all weights and needs
    O(T S) memory. Flash attention and other functions receive the window. They do not support chunks,
    for which sdpa replaces them.

    The cache holds the last W - 1 keys and values, without padding.
    """

    attends = "local"

    @property
    @abstractmethod
    def reach(self) -> Reach:
        """The tokens that a token attends to."""

    @classmethod
    def rotated_dim(cls, options: Any) -> int:
        """Return the head dim K."""
        return options.sizes[2]

    @classmethod
    def rotary(cls, options: Any, sizes: Sizes) -> nn.Module | None:
        """Return a rotary embedding that is exact at any position; None without positions."""
        return build_rotary(options.rope_parameters, options.sizes[2], sizes, ExactRotaryEmbedding)

    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: LocalRows | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        segments: Segments = WHOLE_ROWS,
        cache: Slot | None = None,
        **kwargs: Any,
    ) -> Attended:
        """See ``Mixer.forward``. Without a mask, rows follow from ``segments`` and ``position_ids``."""
        self.check_arguments(kwargs)
        q = self.split_heads(self.q_proj(x), self.q_norm)
        k = self.split_heads(self.k_proj(x), self.k_norm)
        v = self.split_heads(self.v_proj(x))
        positions = kwargs.get("position_ids")
        if position_embeddings is not None:
            q, k = apply_rotary(q, k, *position_embeddings)
        if self.slopes is not None:
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device)[None]
            q, k = add_positions(q, k, positions, self.slopes, self.scaling)
        rows = attention_mask
        if rows is None:
            rows = LocalRows.find((len(x), x.shape[1]), x.device, segments=segments)
            if positions is not None and not segments.packed and segments.index is None:
                rows = LocalRows(positions)
        q, k, v = (rows.arrange(y, 2) for y in (q, k, v))
        if cache is not None:
            k, v = cache.append(window=self.reach.width, lengths=rows.lengths, k=k, v=v)
        o, weights = self._attend_local(q, k, v, rows, kwargs)
        o = rows.restore(o, 1)
        if weights is not None and rows.order is not None:
            past = weights.shape[3] - weights.shape[2]
            own = rows.restore(rows.restore(weights[..., past:], 2), 3)
            weights = torch.cat([rows.restore(weights[..., :past], 2), own], dim=-1)
        return self.output(o.flatten(2), x), weights

    def _attend_local(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: LocalRows,
        kwargs: dict[str, Any],
    ) -> Attended:
        """Return o (B, T, H, K), and the weights (B, H, T, S) of eager attention."""
        name, past = self.attention_name, k.shape[2] - q.shape[2]
        caps: dict[str, Any] = {"soft_cap": self.options.soft_cap, "sinks": self.sink_logits}
        capped = any(cap is not None for cap in caps.values())
        if name == "eager":
            mask = rows.mask(self.reach, past, slice(0, q.shape[2]), slice(0, k.shape[2]))
            if self.slopes is not None:
                # positions are large, and eager attention rounds logits to q.dtype
                q, k = to_float32(q), to_float32(k)
            dropout = self.active_dropout
            return capped_attention(q, k, v, mask, scaling=self.scaling, dropout=dropout, **caps)
        if capped and name not in CAPPED_FUNCTIONS:
            return self._in_blocks(self._capped, q, k, v, rows), None
        if name == "flex_attention":
            return self.attend(q, k, v, rows.block_mask(self.reach, past), kwargs, **caps)
        if name == "sdpa" or (self.reach.chunked and "flash" in name):
            return self._in_blocks(self._sdpa, q, k, v, rows), None
        mask = rows.padding_mask(self.reach, past) if "flash" in name else None
        extent = "chunk_size" if self.reach.chunked else "sliding_window"
        return self.attend(q, k, v, mask, {**kwargs, extent: self.reach.width}, **caps)

    def _in_blocks(
        self,
        attend: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: LocalRows,
    ) -> torch.Tensor:
        """Attend in blocks of queries, each with the keys within its reach: o (B, T, H, K)."""
        time, past, width = q.shape[2], k.shape[2] - q.shape[2], self.reach.width
        if rows.sees_all(self.reach, past):
            return attend(q, k, v, None)
        outputs = []
        for start, stop in self._blocks(time, rows):
            first = max(0, start + past - width + 1)
            whole_chunk = self.reach.chunked and rows.start is not None
            if whole_chunk:
                first = max(first, start + past - (rows.start + start) % width)
            seen = slice(first, stop + past)
            mask = None
            if not (whole_chunk and first == start + past):
                mask = rows.mask(self.reach, past, slice(start, stop), seen)
            outputs.append(attend(q[:, :, start:stop], k[:, :, seen], v[:, :, seen], mask))
        empty = v.new_empty(q.shape[0], 0, q.shape[1], v.shape[3])
        return torch.cat(outputs, dim=1) if outputs else empty

    def _blocks(self, time: int, rows: LocalRows) -> list[tuple[int, int]]:
        """Return start and end of each block of queries: half a window, or a chunk."""
        width = self.reach.width
        if not self.reach.chunked:
            bounds = [*range(0, time, max(width // 2, LEAST_BLOCK)), time]
        else:
            ahead = 0 if rows.start is None else -rows.start % width
            bounds = [0, *range(ahead or width, time, width), time]
        return list(itertools.pairwise(bounds)) if time else []

    def _sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply sdpa attention; causal if ``mask`` is None."""
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return function(
            self, q, k, v, mask, dropout=self.active_dropout, scaling=self.scaling
        )[0]  # fmt: skip

    def _capped(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return capped_attention(
            q, k, v, mask,
            scaling=self.scaling, soft_cap=self.options.soft_cap, sinks=self.sink_logits,
            dropout=self.active_dropout,
        )[0]  # fmt: skip

    def tokens(self) -> dict[str, TokenSpec]:
        """Return keys and values of W tokens; with ALiBi, keys have two extra dims for positions."""
        marks = 2 * (self.slopes is not None)
        k = TokenSpec(self.num_kv_heads, self.head_dim + marks, self.reach.width)
        return {"k": k, "v": TokenSpec(self.num_kv_heads, self.head_dim, self.reach.width)}
