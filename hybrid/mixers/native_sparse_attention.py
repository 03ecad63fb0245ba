"""Native sparse attention: compressed, selected and recent tokens (DeepSeek, arXiv 2502.11089).

Shapes: B rows, T time, S columns of keys, H query heads, H_kv key heads, K head dim, D model dim,
C channels of what is cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.declare import Size, Size0, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.base import Mixer, residual_projection
from hybrid.mixers.grouped_heads import HeadSizeOptions
from hybrid.mixers.sparse_blocks import Blocks, sparse_attention
from hybrid.mixers.sparse_rows import AlignedRow, Rows, banded
from hybrid.nn.packing import WHOLE_ROWS, Segments
from hybrid.nn.past import Slot, TokenSpec
from hybrid.nn.rotary import build_rotary, rotate

NEAR = ("k_window", "v_window", "k_raw", "v_raw")
"""Names of what is kept of the last tokens only."""


@dataclass(frozen=True)
class NativeSparseAttentionOptions(HeadSizeOptions):
    """Options of `native_sparse_attention`: those of `HeadSizeOptions`, and:

    Attributes:
        block_size: l, tokens of a compressed block; at most l'.
        block_stride: d, tokens from one compressed block to the next; divides l and l'.
        compress: what makes one key (or value) of the l of a block: `mlp` (a two-layer network over
            all of them and their places in the block, as the paper has it) or `mean`.
        select_size: l', tokens of a selection block.
        num_selected: n, selection blocks that a query attends to.
        num_initial: of these, how many are always the first ones of the document.
        num_local: of these, how many are always the last ones, the query's own included.
        window: w, tokens of the window branch, the query's own included.
    """

    block_size: Size = 32
    block_stride: Size = 16
    compress: Literal["mlp", "mean"] = "mlp"
    select_size: Size = 64
    num_selected: Size = 16
    num_initial: Size0 = 1
    num_local: Size = 2
    window: Size2 = 512

    @property
    def blocks(self) -> Blocks:
        """The sizes of blocks."""
        return Blocks(
            self.block_size,
            self.block_stride,
            self.select_size,
            self.num_selected,
            self.num_initial,
            self.num_local,
        )

    def problems(self, sizes: Sizes) -> list[str]:
        """Sizes that do not fit together."""
        lines = []
        for name in ("block_size", "select_size"):
            if getattr(self, name) % self.block_stride:
                lines.append(
                    f"{name}: expected a multiple of block_stride {self.block_stride}, got"
                    f" {getattr(self, name)}"
                )
        if self.block_size > self.select_size:
            at_most = f"at most select_size {self.select_size}"
            lines.append(f"block_size: expected {at_most}, got {self.block_size}")
        always = self.num_initial + self.num_local
        if self.num_selected < always:
            lines.append(
                f"num_selected: expected at least num_initial + num_local = {always}, got"
                f" {self.num_selected}"
            )
        return super().problems(sizes) + lines


@register_mixer("native_sparse_attention", symbol="V")
class NativeSparseAttention(Mixer):
    """o_t = g_c o_compressed + g_s o_selected + g_w o_window, each gate sigmoid(x_t w) per head (eq. 5).

    Three branches of softmax attention with keys and values of their own and the same queries: over
    one compressed key per block of l tokens (eq. 7), over the tokens of the n blocks whose compressed
    keys weigh most, the same for all heads of a group (eq. 8 to 12), and over the last w tokens.

    A block's key is W_2 silu(W_1 [k_1 + e_1, ..., k_l + e_l]), or the mean of k_1 to k_l, likewise its
    value; made before rotation, and with the position of the last token of the block.
    The cache holds, per token, its selection key and value and those of the compressed block that ends
    there, where one does; and a window of w or l tokens, whichever is more, for the rest.
    """

    Options = NativeSparseAttentionOptions
    layer_type = "full_attention"
    attends = "full"
    paper = "arXiv 2502.11089"
    formula = "o_t = sum_b g_b softmax(q_t K_b^T) V_b, b of compressed, selected and last tokens"
    used_by = "DeepSeek's NSA 27B"
    continues_packed = False

    def __init__(self, options: NativeSparseAttentionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        d_model = sizes.hidden_size
        self.num_heads, self.num_kv_heads, self.head_dim = options.sizes
        self.scaling, self.blocks, self.window = options.scaling, options.blocks, options.window
        self.past = max(self.window, self.blocks.size) - 1
        inner = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, inner, bias=False)
        # one block of rows for each of compress, select, window
        self.k_proj = nn.Linear(d_model, 3 * self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, 3 * self.num_kv_heads * self.head_dim, bias=False)
        self.gate_proj = nn.Linear(d_model, 3 * self.num_heads, bias=False)
        self.o_proj = residual_projection(inner, d_model)
        # of keys and of values; on the mixer itself, for transformers passes over modules without
        self.places = self.up = self.down = None
        if options.compress == "mlp":
            size, dim = self.blocks.size, self.head_dim
            self.places = nn.Parameter(torch.empty(2, size, dim))
            self.up = nn.Parameter(torch.empty(2, size * dim, dim))
            self.down = nn.Parameter(torch.empty(2, dim, dim))

    def init_parameters(self, std: float) -> None:
        """Normal."""
        for parameter in (self.places, self.up, self.down):
            if parameter is not None:
                init.normal_(parameter, mean=0.0, std=std)

    @classmethod
    def uses_state(cls, options: NativeSparseAttentionOptions) -> bool:
        """The window, and what the next compressed block needs."""
        return True

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Overlapping blocks, few of which are selected; mean blocks side by side, no positions."""
        return [
            {"num_heads": 4, "num_kv_heads": 2, "block_size": 4, "block_stride": 2,
             "select_size": 4, "num_selected": 3, "num_local": 1, "window": 3},
            {"num_heads": 2, "num_kv_heads": 1, "block_size": 3, "block_stride": 3,
             "select_size": 6, "num_selected": 2, "num_initial": 0, "num_local": 1, "window": 8,
             "compress": "mean", "rope_parameters": None},
        ]  # fmt: skip

    @classmethod
    def rotary(cls, options: NativeSparseAttentionOptions, sizes: Sizes) -> nn.Module | None:
        """The rotary embedding of these options; None without positions."""
        return build_rotary(options.rope_parameters, options.sizes[2], sizes)

    def forward(
        self,
        x: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        segments: Segments = WHOLE_ROWS,
        cache: Slot | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `Mixer.forward`; the mask is not used, padding and documents come in `segments`."""
        self.check_arguments(kwargs)
        q = self._heads(self.q_proj(x))
        k_coarse, k, k_near = self._heads(self.k_proj(x)).chunk(3, dim=1)
        v_coarse, v, v_near = self.v_proj(x).chunk(3, dim=-1)
        angles = None
        if position_embeddings is not None:
            q, k, k_near = (rotate(y, *position_embeddings) for y in (q, k, k_near))
            angles = torch.cat(position_embeddings, dim=-1).expand(len(x), -1, -1)
        near = torch.cat([_flat(k_near), v_near, _flat(k_coarse), v_coarse], dim=-1)
        grid = _Grid(segments, x, self.blocks.select_size)
        angles = None if angles is None else grid.spread(angles)
        if cache is not None and grid.is_packed:
            raise ValueError(
                "native_sparse_attention cannot continue packed documents (position_ids that restart)"
                " from a cache or another process; give each document a row of its own"
            )
        if cache is None:
            k, v = (self._heads(grid.spread(y)) for y in (_flat(k), v))
            o = self._one_pass(self._heads(grid.spread(_flat(q))), k, v, near, angles, grid)
        else:
            o = self._continued(q, k, self._heads(v), near, angles, grid, cache)
        o = grid.collect(torch.cat([branch.flatten(2) for branch in o], dim=-1))
        gates = torch.sigmoid(self.gate_proj(x)).unflatten(-1, (3, self.num_heads))
        o = o.unflatten(-1, (3, self.num_heads, self.head_dim)) * gates[..., None]
        return self.o_proj(o.sum(dim=2).flatten(2)), None

    def _one_pass(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        near: torch.Tensor,
        angles: torch.Tensor | None,
        grid: _Grid,
    ) -> list[torch.Tensor]:
        """o (B, S, H, K) of each branch, without a cache, on the grid."""
        near = grid.spread(near)
        column = torch.arange(near.shape[1], device=near.device).expand(len(near), -1)
        raw = F.pad(near, (0, 0, self.blocks.size - 1, 0))
        k_blocks, v_blocks, _ = self._compress(raw, angles, column.new_zeros(len(near)))
        incomplete = self.blocks.size // self.blocks.stride - 1  # they began before the text
        coarse = (k_blocks[:, :, incomplete:], v_blocks[:, :, incomplete:])
        o = sparse_attention(q, coarse, (k, v), column, grid.base, self.blocks, self.scaling)
        return [*o, self._nearby(q, near, column - grid.base)]

    def _continued(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        near: torch.Tensor,
        angles: torch.Tensor | None,
        grid: _Grid,
        cache: Slot,
    ) -> list[torch.Tensor]:
        """o (B, T, H, K) of each branch, after what the cache holds; a row of the grid is one text.

        q, k, v (B, h, T, K) and near (B, T, C) come as they are in the batch, with padding between.
        """
        (real,) = cache.append(real=grid.real(k)[:, None, :, None])
        real = real[:, 0, :, 0] > 0.5
        seen = real.sum(dim=1) - grid.lengths
        near = self._remember(grid.spread(near), grid.rows.lengths, cache)
        longest = near.shape[1] - self.past
        raw = near[:, self.past - self.blocks.size + 1 :]
        k_blocks, v_blocks, end = self._compress(raw, angles, seen % self.blocks.stride)
        end = end.clamp(max=longest)[:, None, :, None]  # blocks that end later go where none looks

        def at_their_ends(blocks: torch.Tensor) -> torch.Tensor:
            """(B, H_kv, C, K) -> (B, H_kv, T, K), zeros where no block ends."""
            place = end.expand_as(blocks)
            room = blocks.new_zeros(*blocks.shape[:2], longest + 1, blocks.shape[3])
            return self._heads(grid.collect(_flat(room.scatter(2, place, blocks)[:, :, :-1])))

        k, v, k_blocks, v_blocks = cache.append(
            k=k, v=v, k_block=at_their_ends(k_blocks), v_block=at_their_ends(v_blocks)
        )
        # tokens first, padding and what a static cache has not filled behind them
        order = real.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, None, :, None]
        k, v, k_blocks, v_blocks = (
            y.gather(2, order.expand(-1, *y.shape[1:2], -1, y.shape[3]))
            for y in (k, v, k_blocks, v_blocks)
        )
        q = self._heads(grid.spread(_flat(q)))
        column = seen[:, None] + torch.arange(longest, device=k.device)
        column = column.clamp(max=k.shape[2] - 1)
        first, stride = self.blocks.size - 1, self.blocks.stride
        coarse = (k_blocks[:, :, first::stride], v_blocks[:, :, first::stride])
        o = sparse_attention(q, coarse, (k, v), column, grid.base, self.blocks, self.scaling)
        return [*o, self._nearby(q, near[:, self.past - self.window + 1 :], column)]

    def _remember(
        self, near: torch.Tensor, lengths: torch.Tensor | None, cache: Slot
    ) -> torch.Tensor:
        """(N, P + T, C): `near` (N, T, C) behind the last P tokens before, which are kept.

        Args:
            near: keys and values of the window, then those to compress.
            lengths: (N,), tokens of each row, padding behind them; None for T.
        """
        time = near.shape[1]
        parts = dict(zip(NEAR, near.chunk(4, dim=-1), strict=True))
        tokens = {name: self._heads(part) for name, part in parts.items()}
        found = cache.append(window=self.past + 1, lengths=lengths, **tokens)
        near = torch.cat([_flat(y) for y in found], dim=-1)
        return F.pad(near, (0, 0, self.past + time - near.shape[1], 0))

    def _compress(
        self, raw: torch.Tensor, angles: torch.Tensor | None, phase: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The compressed blocks that end among T tokens.

        Args:
            raw: (N, l - 1 + T, C), the tokens, with the l - 1 before them.
            angles: (N, T, 2 R), cos and sin.
            phase: (N,), tokens after the last whole stride before the T.

        Returns:
            Keys and values (N, H_kv, ceil(T / d), K), and the token each ends with (N, ceil(T / d)); a
            block that would end at T or later is none.
        """
        size, stride = self.blocks.size, self.blocks.stride
        time = raw.shape[1] - size + 1
        number = torch.arange(-(-time // stride), device=raw.device)
        end = (size - 1 - phase)[:, None] % stride + stride * number
        place = end[..., None] + torch.arange(size, device=raw.device)
        place = place.clamp(max=raw.shape[1] - 1).flatten(1)[..., None]
        raw = raw[..., raw.shape[2] // 2 :]
        blocks = raw.gather(1, place.expand(-1, -1, raw.shape[2]))
        blocks = blocks.unflatten(1, (-1, size)).unflatten(3, (2, self.num_kv_heads, -1))
        blocks = blocks.permute(3, 0, 4, 1, 2, 5)  # (2, N, H_kv, C, l, K)
        if self.places is None or self.up is None or self.down is None:
            k, v = blocks.mean(dim=4).unbind(0)
        else:
            blocks = (blocks + self.places[:, None, None, None]).flatten(4)
            k, v = F.silu(blocks @ self.up[:, None, None]) @ self.down[:, None, None]
        if angles is not None:
            place = end.clamp(max=time - 1)[..., None].expand(-1, -1, angles.shape[2])
            k = rotate(k, *angles.gather(1, place).chunk(2, dim=-1))
        return k, v, end

    def _nearby(self, q: torch.Tensor, near: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """o (B, T, H, K) of the window branch for q (B, H, T, K), `place` (B, T) in their documents."""
        k, v = (self._heads(y) for y in near[..., : near.shape[2] // 2].chunk(2, dim=-1))
        ahead = near.shape[1] - q.shape[2]
        column = torch.arange(q.shape[2], device=q.device) + ahead
        first = column - place.clamp(max=self.window - 1)
        return banded(self._attend_near, q, k, v, first, self.window)

    def _attend_near(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scaling)
        return o.transpose(1, 2)

    def _heads(self, y: torch.Tensor) -> torch.Tensor:
        """(B, T, h K) -> (B, h, T, K)."""
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def mixing_flops(self, context: int) -> float:
        """Logits and weighted sums of the three branches, and the making of compressed keys."""
        sizes = self.blocks
        starts = max(0, context - sizes.size + 1)  # tokens that see at least one block
        whole, rest = divmod(starts, sizes.stride)
        coarse = sizes.stride * _sum_to(whole) + rest * (whole + 1)
        selected = sizes.selected * sizes.select_size
        early, late = min(context, selected), max(0, context - selected)
        whole, rest = divmod(late, sizes.select_size)
        fine = _sum_to(early) + late * (selected - sizes.select_size)
        fine += whole * _sum_to(sizes.select_size) + _sum_to(rest)
        near = _sum_to(min(context, self.window)) + max(0, context - self.window) * self.window
        made = 2.0 * sum(w.numel() for w in (self.up, self.down) if w is not None)
        attended = 4.0 * self.num_heads * self.head_dim * (coarse + fine + near) / context
        return attended + self.num_kv_heads * made / sizes.stride

    def tokens(self) -> dict[str, TokenSpec]:
        """Keys and values of each branch.

        For all tokens: whether it is one, its key and value, and those of the compressed block that ends
        with it. For the last P: those of the window, and those to compress.
        """
        every = TokenSpec(self.num_kv_heads, self.head_dim)
        near = TokenSpec(self.num_kv_heads, self.head_dim, self.past + 1)
        found = {"real": TokenSpec(1, 1), **dict.fromkeys(("k", "v", "k_block", "v_block"), every)}
        return found | dict.fromkeys(NEAR, near)


def _flat(y: torch.Tensor) -> torch.Tensor:
    """(B, h, T, K) -> (B, T, h K)."""
    return y.transpose(1, 2).flatten(2)


def _sum_to(n: int) -> int:
    return n * (n + 1) // 2


class _Grid:
    """Where the tokens of a batch lie while they are attended to.

    A row each where rows are whole or padded, without the padding; packed documents in one row, each
    from a multiple of l' on.

    Attributes:
        lengths: (rows,), real tokens of each row.
        base: (1, columns or 1), the first column of the document that each column is in.
    """

    def __init__(self, segments: Segments, x: torch.Tensor, align: int) -> None:
        self.segments, self.shape = segments, x.shape[:2]
        packed = segments.pack(x[..., :1])
        self.base = torch.zeros(1, 1, dtype=torch.long, device=x.device)
        if segments.cu_seqlens is None or segments.index is not None:
            self.rows = Rows(segments.cu_seqlens, packed)
        else:
            self.rows = AlignedRow(segments.cu_seqlens, packed, align)
            self.base = self.rows.base
        lengths = self.rows.lengths
        if lengths is None:
            lengths = self.base.new_full(x.shape[:1], x.shape[1])
        self.lengths = lengths

    @property
    def is_packed(self) -> bool:
        """Whether several documents lie in one row."""
        return isinstance(self.rows, AlignedRow)

    def spread(self, y: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (rows, columns, C)."""
        return self.rows.spread(self.segments.pack(y))

    def collect(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse of `spread`, zeros at padding."""
        return self.segments.unpack(self.rows.collect(y), *self.shape)

    def real(self, like: torch.Tensor) -> torch.Tensor:
        """1 at tokens (B, T), 0 at padding."""
        ones = like.new_ones(*self.shape, 1)
        return self.segments.unpack(self.segments.pack(ones), *self.shape)[..., 0]
