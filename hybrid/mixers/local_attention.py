"""Softmax attention to a bounded number of tokens before: what windows and chunks share.

Shapes: B rows, T time, N documents, H query heads, H_kv key heads, K head dim, W reach.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hybrid.config.sizes import Sizes
from hybrid.mixers.attention import add_positions, capped_attention
from hybrid.mixers.base import StateMixer
from hybrid.mixers.grouped_heads import GroupedHeadOptions, GroupedHeads
from hybrid.nn.past import Slot, StateSpec
from hybrid.nn.rotary import BY_LENGTH, build_rotary, rotate


@dataclass(frozen=True)
class LocalAttentionOptions(GroupedHeadOptions):
    """Options of softmax mixers with a bounded reach: those of `GroupedHeadOptions`."""

    def problems(self, sizes: Sizes) -> list[str]:
        """Sizes that do not fit together."""
        lines = super().problems(sizes)
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind in BY_LENGTH:
            lines.append(
                f"rope_parameters.rope_type: {kind!r} depends on the length of the sequence, which a"
                " window does not see; take another"
            )
        return lines


class LocalAttention(GroupedHeads, StateMixer):
    """o_t = sum_s softmax_s(scale * q_t . k_s) v_s over the tokens within reach, W at most.

    What it remembers is of fixed size, so it is a state: the last W - 1 keys and values of real tokens,
    before their rotation, in the cache's convolution slot. Distances follow from places in the state;
    nothing depends on absolute positions, and padding never takes up room.
    Queries go in blocks of about W, so that time and memory grow with T W.
    """

    attends = "local"

    def build_local(self, options: GroupedHeadOptions, width: int) -> None:
        """Create the projections, and the rotary embedding; `width` is W."""
        self.build(options)
        self.width = width
        self.rotary_embedding = build_rotary(options.rope_parameters, self.head_dim, self.sizes)

    @abstractmethod
    def reach(self, place: torch.Tensor) -> torch.Tensor:
        """How many tokens before it a token attends to, W - 1 at most.

        Args:
            place: int64, tokens of its document before it.
        """

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """See the class."""
        q, k = self.split_heads(self.q_proj(x), self.q_norm), self.k_proj(x)
        k, v = self.split_heads(k, self.k_norm), self.v_proj(x)
        token = torch.arange(x.shape[1], device=x.device)
        if cache is None:
            place = token[None]
            if cu_seqlens is not None:
                bounds = cu_seqlens.long()
                place = place - bounds[torch.searchsorted(bounds, token, right=True) - 1]
            o = self._banded(q, k, self.split_heads(v), place)
            return self.output(o, x)
        kv = torch.cat([k.transpose(1, 2).flatten(2), v], dim=-1)
        rows = Rows(cu_seqlens, x)
        kv, seen = self._remember(rows.spread(kv), rows.lengths, cache)
        k, v = (self.split_heads(y) for y in kv.chunk(2, dim=-1))
        q = rows.spread(q.transpose(1, 2).flatten(2))
        place = seen[:, None] + torch.arange(q.shape[1], device=x.device)
        o = self._banded(self.split_heads(q), k, v, place)
        return self.output(rows.collect(o), x)

    def _remember(
        self, kv: torch.Tensor, lengths: torch.Tensor | None, cache: Slot
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put what is remembered (N, W - 1, C) before kv (N, T, C), and store what is to be next.

        The state has one channel more, 1 for tokens that the next one attends to: their number is all
        that has to be known of the past. Returns the keys and values, and that number (N,).
        """
        past = self.width - 1
        if lengths is None:
            lengths = kv.new_full(kv.shape[:1], kv.shape[1], dtype=torch.long)
        state = cache.state("conv")
        if state is None:
            state = kv.new_zeros(kv.shape[0], kv.shape[2] + 1, past)
        seen = (state[:, -1] > 0.5).sum(dim=1)
        kv, last = append(state[:, :-1], kv, lengths)
        column = torch.arange(past, device=kv.device)
        marks = column >= past - self.reach(seen + lengths)[:, None]
        cache.set_state("conv", torch.cat([last, marks[:, None].to(kv.dtype)], dim=1))
        return kv, seen

    def _banded(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, place: torch.Tensor
    ) -> torch.Tensor:
        """Attention within reach, (B, T, H K), for q (B, H, T, K), k and v (B, H_kv, S, K), S >= T.

        Query t stands at column t + S - T of the keys, and has `place` (B or 1, T) in its document.
        """
        ahead = k.shape[2] - q.shape[2]
        columns = torch.arange(k.shape[2], device=q.device)
        if self.rotary_embedding is not None:
            cos, sin = self._angles(columns, k.dtype)
            q, k = rotate(q, cos[:, ahead:], sin[:, ahead:]), rotate(k, cos, sin)
        if self.slopes is not None:
            q, k = add_positions(q, k, columns[None], self.slopes, self.scaling)
        first = columns[ahead:] - self.reach(place)
        return banded(self.attend_within, q, k, v, first, self.width).flatten(2)

    def attend_within(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """o (B, T, H, K) of q (B, H, T, K), k and v (B, H, S, K), mask (B or 1, 1, T, S)."""
        dropout = self.options.dropout if self.training else 0.0
        cap = self.options.soft_cap
        if self.sink_logits is not None or cap is not None:
            given = {"scaling": self.scaling, "dropout": dropout}
            return capped_attention(q, k, v, mask, soft_cap=cap, sinks=self.sink_logits, **given)[0]
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scaling
        )
        return o.transpose(1, 2)

    def _angles(
        self, columns: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (1, S, R) of columns (S,).

        In float64 up to the cosine: where counting starts must not matter.
        """
        assert self.rotary_embedding is not None
        frequencies = self.rotary_embedding.inv_freq.double()
        angle = torch.outer(columns.double(), frequencies).repeat(1, 2)[None]
        scaling = self.rotary_embedding.attention_scaling
        return (angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype)

    def states(self) -> dict[str, StateSpec]:
        """W - 1 keys and values, and a mark for each."""
        return {"conv": StateSpec((2 * self.num_kv_heads * self.head_dim + 1, self.width - 1))}


def append(
    state: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put what is remembered before what is new.

    Args:
        state: (N, C, P), the last P tokens.
        new: (N, T, C).
        lengths: (N,), how many tokens of each row are real; the rest comes after them.

    Returns:
        Both, (N, P + T, C); and the last P tokens now, (N, C, P).
    """
    both = torch.cat([state.to(new.dtype).transpose(1, 2), new], dim=1)
    place = lengths[:, None] + torch.arange(state.shape[2], device=new.device)
    last = both.gather(1, place[..., None].expand(-1, -1, new.shape[2]))
    return both, last.transpose(1, 2)


def banded(
    attend: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """Attention within a band of `width` columns, in blocks of queries.

    Args:
        attend: (q, k, v, mask) of a block -> o (B, t, H, K), with as many heads of k and v as of q.
        q: (B, H, T, K).
        k, v: (B, H_kv, S, K), S >= T; query t stands at column t + S - T.
        first: (B or 1, T), the first column that each query sees, above t + S - T - width.

    Returns:
        o (B, T, H, K).
    """
    time, ahead = q.shape[2], k.shape[2] - q.shape[2]
    columns = torch.arange(k.shape[2], device=q.device)
    groups = q.shape[1] // k.shape[1]
    k, v = (y.repeat_interleave(groups, dim=1) if groups > 1 else y for y in (k, v))
    block, outputs = max(width, 64), []
    for start in range(0, time, block):
        stop = min(start + block, time)
        seen = slice(max(0, start + ahead - width + 1), stop + ahead)
        at, key = columns[start + ahead : stop + ahead, None], columns[seen]
        mask = (key <= at) & (key >= first[:, start:stop, None])
        outputs.append(attend(q[:, :, start:stop], k[:, :, seen], v[:, :, seen], mask[:, None]))
    empty = v.new_empty(q.shape[0], 0, q.shape[1], v.shape[3])
    return torch.cat(outputs, dim=1) if outputs else empty


class Rows:
    """Documents packed in one row, spread out to a row each and back; whole rows stay as they are.

    Attributes:
        lengths: (N,), tokens of each document; None where rows are whole.
    """

    def __init__(self, cu_seqlens: torch.Tensor | None, x: torch.Tensor) -> None:
        self.lengths: torch.Tensor | None = None
        if cu_seqlens is None:
            return
        bounds = cu_seqlens.long()
        self.lengths = bounds[1:] - bounds[:-1]
        token = torch.arange(x.shape[1], device=x.device)
        document = torch.searchsorted(bounds, token, right=True) - 1
        starts, self.shape = self.arrange(self.lengths)
        self.place = starts[document] + token - bounds[document]

    def arrange(self, lengths: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """The flat place (N,) of the first token of each document, and the shape of it all."""
        longest = int(lengths.max())
        starts = longest * torch.arange(len(lengths), device=lengths.device)
        return starts, (len(lengths), longest)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(1, tokens, C) -> (rows, columns, C), zeros where no token is."""
        if self.lengths is None:
            return x
        flat = x.new_zeros(self.shape[0] * self.shape[1], x.shape[2])
        return flat.index_copy(0, self.place, x[0]).view(*self.shape, x.shape[2])

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, columns, C) -> (1, tokens, C)."""
        return x if self.lengths is None else x.flatten(0, 1)[self.place][None]


class AlignedRow(Rows):
    """Documents packed in one row, moved apart so that each begins at a multiple of `align`.

    Attributes:
        base: (1, columns), the column where the document that a column belongs to begins.
    """

    def __init__(self, cu_seqlens: torch.Tensor, x: torch.Tensor, align: int) -> None:
        self.align = align
        super().__init__(cu_seqlens, x)

    def arrange(self, lengths: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """See `Rows.arrange`."""
        ends = (-(-lengths // self.align) * self.align).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        columns = int(ends[-1])
        column = torch.arange(columns, device=lengths.device)
        self.base = starts[torch.searchsorted(ends, column, right=True)][None]
        return starts, (1, columns)
