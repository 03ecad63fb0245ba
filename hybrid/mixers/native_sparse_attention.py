"""Native sparse attention: compressed, selected and recent tokens (DeepSeek, arXiv 2502.11089).

Shapes: B rows, T time, S columns of keys, H query heads, H_kv key heads, K head dim, D model dim,
C cached channels, R rotated dims.
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
from hybrid.mixers.base import Mixer
from hybrid.mixers.grouped_heads import HeadSizeOptions
from hybrid.mixers.sparse_blocks import Blocks, sparse_attention
from hybrid.mixers.sparse_rows import AlignedRow, DocumentRows, banded
from hybrid.nn.packing import WHOLE_ROWS, Segments
from hybrid.nn.past import Slot, TokenSpec
from hybrid.nn.rotary import build_rotary, rotate

NEAR = ("k_window", "v_window", "k_raw", "v_raw")
"""Names of the cache entries that hold only the last tokens."""


@dataclass(frozen=True)
class NativeSparseAttentionOptions(HeadSizeOptions):
    """Options of ``native_sparse_attention``, in addition to those of ``HeadSizeOptions``.

    Attributes:
        block_size: l, tokens per compressed block; at most l'.
        block_stride: d, tokens between the starts of two compressed blocks; must divide l and l'.
        compress: map from the l keys (or values) of a block to one: ``mlp`` (a two-layer network over
            all of them with position embeddings, as in the paper) or ``mean``.
        select_size: l', tokens per selection block.
        num_selected: n, selection blocks that a query attends to.
        num_initial: how many of the n are always the first blocks of the document.
        num_local: how many of the n are always the last blocks, including the query's own block.
        window: w, tokens of the window branch, including the query's own token.
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
        """The block sizes."""
        return Blocks(
            self.block_size,
            self.block_stride,
            self.select_size,
            self.num_selected,
            self.num_initial,
            self.num_local,
        )

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes."""
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
    """Native sparse attention mixer (arXiv 2502.11089, eq. 5).

    o_t = g_c o_compressed + g_s o_selected + g_w o_window, each gate sigmoid(x_t w) per head.

    Three branches of softmax attention share the queries and have their own keys and values:

    - over one compressed key per block of l tokens (eq. 7);
    - over the tokens of the n blocks with the largest weights of compressed keys, the same blocks for
      all heads of a group (eq. 8 to 12);
    - over the last w tokens.

    The compressed key of a block is W_2 silu(W_1 [k_1 + e_1, ..., k_l + e_l]), or the mean of k_1 to
    k_l. Values are compressed likewise. Compression comes before rotation; a compressed key has the
    position of the last token of its block.

    The cache holds, per token, the selection key and value, and the key and value of the compressed
    block that ends at the token, if any. It holds a window of max(w, l) tokens for the other keys and
    values.
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
        # one block of rows for each branch: compress, select, window
        self.k_proj = nn.Linear(d_model, 3 * self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, 3 * self.num_kv_heads * self.head_dim, bias=False)
        self.gate_proj = nn.Linear(d_model, 3 * self.num_heads, bias=False)
        self.o_proj = nn.Linear(inner, d_model, bias=False)
        # for keys and values; parameters of the mixer itself, so that transformers initialises them
        self.places = self.up = self.down = None
        if options.compress == "mlp":
            size, dim = self.blocks.size, self.head_dim
            self.places = nn.Parameter(torch.empty(2, size, dim))
            self.up = nn.Parameter(torch.empty(2, size * dim, dim))
            self.down = nn.Parameter(torch.empty(2, dim, dim))

    def init_parameters(self, std: float) -> None:
        """Draw the parameters of the compression from a normal distribution."""
        for parameter in (self.places, self.up, self.down):
            if parameter is not None:
                init.normal_(parameter, mean=0.0, std=std)

    @classmethod
    def uses_state(cls, options: NativeSparseAttentionOptions) -> bool:
        """Return True: the window and the inputs of the next compressed block are a state."""
        return True

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return overlapping blocks with few selected; mean over disjoint blocks without positions."""
        return [
            {"num_heads": 4, "num_kv_heads": 2, "block_size": 4, "block_stride": 2,
             "select_size": 4, "num_selected": 3, "num_local": 1, "window": 3},
            {"num_heads": 2, "num_kv_heads": 1, "block_size": 3, "block_stride": 3,
             "select_size": 6, "num_selected": 2, "num_initial": 0, "num_local": 1, "window": 8,
             "compress": "mean", "rope_parameters": None},
        ]  # fmt: skip

    @classmethod
    def rotary(cls, options: NativeSparseAttentionOptions, sizes: Sizes) -> nn.Module | None:
        """Return the rotary embedding of these options; None without positions."""
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
        """See ``Mixer.forward``. The mask is not used; ``segments`` has padding and documents."""
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
                "position_ids: expected one document per row, as native_sparse_attention cannot continue"
                " packed documents from a cache or another process, got position_ids that restart; try"
                " one row per document"
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
        """Return o (B, S, H, K) of each branch, on the grid and without a cache."""
        near = grid.spread(near)
        column = torch.arange(near.shape[1], device=near.device).expand(len(near), -1)
        raw = F.pad(near, (0, 0, self.blocks.size - 1, 0))
        k_blocks, v_blocks, _ = self._compress(raw, angles, column.new_zeros(len(near)))
        incomplete = self.blocks.size // self.blocks.stride - 1  # blocks that start before the text
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
        """Return o (B, T, H, K) of each branch, continued from the cache; one text per row of the grid.

        q, k, v (B, h, T, K) and near (B, T, C) are in the order of the batch, with padding.
        """
        (real,) = cache.append(real=grid.real(k)[:, None, :, None])
        real = real[:, 0, :, 0] > 0.5
        seen = real.sum(dim=1) - grid.lengths
        near = self._remember(grid.spread(near), grid.rows.lengths, cache)
        longest = near.shape[1] - self.past
        raw = near[:, self.past - self.blocks.size + 1 :]
        k_blocks, v_blocks, end = self._compress(raw, angles, seen % self.blocks.stride)
        # blocks that end later go to an unused column
        end = end.clamp(max=longest)[:, None, :, None]

        def at_their_ends(blocks: torch.Tensor) -> torch.Tensor:
            """Scatter (B, H_kv, C, K) to (B, H_kv, T, K), with zeros where no block ends."""
            place = end.expand_as(blocks)
            room = blocks.new_zeros(*blocks.shape[:2], longest + 1, blocks.shape[3])
            return self._heads(grid.collect(_flat(room.scatter(2, place, blocks)[:, :, :-1])))

        k, v, k_blocks, v_blocks = cache.append(
            k=k, v=v, k_block=at_their_ends(k_blocks), v_block=at_their_ends(v_blocks)
        )
        # tokens first, then padding and unfilled columns of a static cache
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
        """Prepend the last P cached tokens to ``near`` (N, T, C): (N, P + T, C). Update the cache.

        Args:
            near: keys and values of the window, then those to compress.
            lengths: (N,), tokens of each row, followed by padding; None for T.
        """
        time = near.shape[1]
        parts = dict(zip(NEAR, near.chunk(4, dim=-1), strict=True))
        tokens = {name: self._heads(part) for name, part in parts.items()}
        windows = cache.append(window=self.past + 1, lengths=lengths, **tokens)
        near = torch.cat([_flat(y) for y in windows], dim=-1)
        return F.pad(near, (0, 0, self.past + time - near.shape[1], 0))

    def _compress(
        self, raw: torch.Tensor, angles: torch.Tensor | None, phase: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the compressed blocks that end among T tokens.

        Args:
            raw: (N, l - 1 + T, C), the T tokens and the l - 1 tokens before them.
            angles: (N, T, 2 R), cos and sin, or None.
            phase: (N,), number of tokens since the last whole stride before the T tokens.

        Returns:
            Keys and values (N, H_kv, ceil(T / d), K), and the last token of each block
            (N, ceil(T / d)). Ignore blocks whose last token is T or later.
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
        """Return o (B, T, H, K) of the window branch; ``place`` (B, T): positions in the documents."""
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
        """Split (B, T, h K) into (B, h, T, K)."""
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def mixing_flops(self, context: int) -> float:
        """Count logits and weighted sums of the three branches, and the compression."""
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
        compression = 2.0 * sum(w.numel() for w in (self.up, self.down) if w is not None)
        attended = 4.0 * self.num_heads * self.head_dim * (coarse + fine + near) / context
        return attended + self.num_kv_heads * compression / sizes.stride

    def tokens(self) -> dict[str, TokenSpec]:
        """Return the keys and values of each branch.

        For all tokens: a flag for real tokens, key and value, and key and value of the compressed block
        that ends at the token. For the last P tokens: keys and values of the window and to compress.
        """
        every = TokenSpec(self.num_kv_heads, self.head_dim)
        near = TokenSpec(self.num_kv_heads, self.head_dim, self.past + 1)
        specs = {"real": TokenSpec(1, 1), **dict.fromkeys(("k", "v", "k_block", "v_block"), every)}
        return specs | dict.fromkeys(NEAR, near)


def _flat(y: torch.Tensor) -> torch.Tensor:
    """Flatten (B, h, T, K) to (B, T, h K)."""
    return y.transpose(1, 2).flatten(2)


def _sum_to(n: int) -> int:
    return n * (n + 1) // 2


class _Grid:
    """Positions of the tokens of a batch during attention.

    Whole and padded rows keep one row each, without the padding. Packed documents share one row, and
    each starts at a multiple of l'.

    Attributes:
        lengths: (rows,), number of real tokens of each row.
        base: (1, columns or 1), first column of the document of each column.
    """

    def __init__(self, segments: Segments, x: torch.Tensor, align: int) -> None:
        self.segments, self.shape = segments, x.shape[:2]
        packed = segments.pack(x[..., :1])
        self.base = torch.zeros(1, 1, dtype=torch.long, device=x.device)
        if segments.cu_seqlens is None or segments.index is not None:
            self.rows = DocumentRows(segments.cu_seqlens, packed)
        else:
            self.rows = AlignedRow(segments.cu_seqlens, packed, align)
            self.base = self.rows.base
        lengths = self.rows.lengths
        if lengths is None:
            lengths = self.base.new_full(x.shape[:1], x.shape[1])
        self.lengths = lengths

    @property
    def is_packed(self) -> bool:
        """Whether one row holds several documents."""
        return isinstance(self.rows, AlignedRow)

    def spread(self, y: torch.Tensor) -> torch.Tensor:
        """Arrange (B, T, C) as (rows, columns, C)."""
        return self.rows.spread(self.segments.pack(y))

    def collect(self, y: torch.Tensor) -> torch.Tensor:
        """Invert ``spread``, with zeros at padding."""
        return self.segments.unpack(self.rows.collect(y), *self.shape)

    def real(self, like: torch.Tensor) -> torch.Tensor:
        """Return (B, T): 1 at tokens, 0 at padding."""
        ones = like.new_ones(*self.shape, 1)
        return self.segments.unpack(self.segments.pack(ones), *self.shape)[..., 0]
