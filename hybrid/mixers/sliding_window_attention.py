"""Sliding window attention: each token attends to the last W (arXiv 2004.05150; Mistral, 2310.06825).

Shapes: B rows, T time, N documents, H query heads, H_kv key heads, K head dim, W window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.cache import LayerCache
from hybrid.mixers.base import MixerOptions, StateMixer, residual_projection
from hybrid.mixers.parts import positive
from hybrid.mixers.softmax_attention import SoftmaxAttentionOptions
from hybrid.norms import build_norm
from hybrid.registry import register_mixer
from hybrid.rotary import RotaryEmbedding, apply_rotary

if TYPE_CHECKING:
    from hybrid.config import HybridConfig

# Rope types whose frequencies depend on how long the sequence is, which a window never sees.
BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class SlidingWindowAttentionOptions(MixerOptions):
    """Options of `sliding_window_attention`.

    Attributes:
        window: W, tokens that a token attends to, itself included.
        num_heads: query heads H; default D / 64, at least 1.
        num_kv_heads: key and value heads; default H; must divide H.
        head_dim: K; default D / H.
        rope_parameters: transformers' rope dictionary; null for no positions.
        qk_norm: RMSNorm of q and k: `head` (over K), or null.
        bias: biases on q, k, v.
        output_bias: bias on the output projection.
        scale: of the logits; default K ** -0.5.
    """

    window: int = 2048
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_parameters: dict | None = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    qk_norm: Literal["head"] | None = None
    bias: bool = False
    output_bias: bool = False
    scale: float | None = None

    def complete(self, hidden_size: int) -> SlidingWindowAttentionOptions:
        """Fill in heads and dims."""
        done = self._as_softmax().complete(hidden_size)
        values = {**vars(self), "num_heads": done.num_heads}
        return type(self)(
            **{**values, "num_kv_heads": done.num_kv_heads, "head_dim": done.head_dim}
        )

    def problems(self, config: HybridConfig) -> list[str]:
        """Sizes that do not fit together."""
        lines = self._as_softmax().problems(config)
        if self.window < 2:
            lines.append(f"window: must be at least 2, found {self.window}")
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind in BY_LENGTH:
            lines.append(
                f"rope_parameters.rope_type: {kind!r} depends on the length of the sequence, which a"
                " window does not see; take another"
            )
        return lines + positive(scale=self.scale)

    def _as_softmax(self) -> SoftmaxAttentionOptions:
        """The same sizes as options of full attention, whose defaults and checks they share."""
        return SoftmaxAttentionOptions(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope_parameters=self.rope_parameters,
        )


@register_mixer("sliding_window_attention", symbol="W")
class SlidingWindowAttention(StateMixer):
    """o_t = sum_s softmax_s(scale * q_t . k_s) v_s over t - W < s <= t.

    What it remembers is of fixed size, so it is a state: the last W - 1 keys and values of real tokens,
    before their rotation, in the cache's convolution slot. Distances follow from places in the
    window; nothing depends on absolute positions, and padding never takes up room.
    Queries go in blocks of about W, so that time and memory grow with T W.
    """

    Options = SlidingWindowAttentionOptions
    paper = "arXiv 2004.05150; Mistral arXiv 2310.06825"
    formula = "o_t = sum_s softmax_s(scale q_t . k_s) v_s, t - W < s <= t"
    used_by = "Mistral, Gemma 2 and 3, GPT-OSS, RecurrentGemma, Samba"

    def __init__(
        self, options: SlidingWindowAttentionOptions, config: HybridConfig, layer_idx: int
    ) -> None:
        super().__init__(options, config, layer_idx)
        assert options.num_heads is not None
        assert options.num_kv_heads is not None
        assert options.head_dim is not None
        d_model, self.window, self.head_dim = config.hidden_size, options.window, options.head_dim
        self.num_heads, self.num_kv_heads = options.num_heads, options.num_kv_heads
        self.scaling = self.head_dim**-0.5 if options.scale is None else options.scale
        inner, inner_kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, inner, bias=options.bias)
        self.k_proj = nn.Linear(d_model, inner_kv, bias=options.bias)
        self.v_proj = nn.Linear(d_model, inner_kv, bias=options.bias)
        self.o_proj = residual_projection(inner, d_model, bias=options.output_bias)
        self.q_norm = self.k_norm = None
        if options.qk_norm:
            self.q_norm = build_norm("rmsnorm", self.head_dim, config.norm_eps)
            self.k_norm = build_norm("rmsnorm", self.head_dim, config.norm_eps)
        self.rotary_embedding = None
        if options.rope_parameters is not None:
            self.rotary_embedding = RotaryEmbedding(
                options.rope_parameters, self.head_dim, config.max_position_embeddings
            )

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Grouped heads and QK-norm; a wider window, no positions, biases."""
        return [
            {"window": 5, "num_heads": 4, "num_kv_heads": 2, "qk_norm": "head"},
            {"window": 16, "num_heads": 2, "rope_parameters": None, "bias": True,
             "output_bias": True},
        ]  # fmt: skip

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: LayerCache | None
    ) -> torch.Tensor:
        """See the class."""
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (
                norm(y.unflatten(-1, (-1, self.head_dim))).flatten(-2)
                for norm, y in ((self.q_norm, q), (self.k_norm, k))
            )
        if cache is None:
            document = None
            if cu_seqlens is not None:
                token = torch.arange(x.shape[1], device=x.device)
                document = torch.searchsorted(cu_seqlens.long(), token, right=True)[None]
            return self.o_proj(self._banded(q, k, v, None, document))
        kv = torch.cat([k, v, torch.ones_like(k[..., :1])], dim=-1)  # the last marks real tokens
        rows = _Rows(cu_seqlens, x)
        kv = self._remember(rows.spread(kv), rows.lengths, cache)
        k, v, real = kv.split([k.shape[-1], v.shape[-1], 1], dim=-1)
        o = self._banded(rows.spread(q), k, v, real[..., 0] > 0.5, None)
        return self.o_proj(rows.collect(o))

    def _remember(
        self, kv: torch.Tensor, lengths: torch.Tensor | None, cache: LayerCache
    ) -> torch.Tensor:
        """Put the window (N, W - 1, C) before kv (N, T, C), and store what is the window next."""
        before = cache.conv_state()
        if before is None:
            before = kv.new_zeros(kv.shape[0], kv.shape[2], self.window - 1)
        kv = torch.cat([before.to(kv.dtype).transpose(1, 2), kv], dim=1)
        if lengths is None:
            last = kv[:, kv.shape[1] - (self.window - 1) :]
        else:
            place = lengths[:, None] + torch.arange(self.window - 1, device=kv.device)
            last = kv.gather(1, place[..., None].expand(-1, -1, kv.shape[2]))
        cache.set_conv_state(last.transpose(1, 2).contiguous())
        return kv

    def _banded(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        real: torch.Tensor | None,
        document: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention within the window, (B, T, H K), for q (B, T, H K), k and v (B, S, H_kv K), S >= T.

        Query t stands at place t + S - T of the keys. `real` (B, S) is False where a key is none;
        `document` (1, T) numbers the documents, with S = T.
        """
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        time, ahead = q.shape[2], k.shape[2] - q.shape[2]
        if self.rotary_embedding is not None:
            cos, sin = self._angles(k)
            k, _ = apply_rotary(k, k, cos, sin)
            q, _ = apply_rotary(q, q, cos[:, ahead:], sin[:, ahead:])
        groups = self.num_heads // self.num_kv_heads
        k, v = (y.repeat_interleave(groups, dim=1) if groups > 1 else y for y in (k, v))
        block, outputs = max(self.window, 64), []
        for start in range(0, time, block):
            stop = min(start + block, time)
            first, end = max(0, start + ahead - self.window + 1), stop + ahead
            at = torch.arange(start + ahead, end, device=q.device)[:, None]
            key = torch.arange(first, end, device=q.device)[None]
            mask = ((key <= at) & (key > at - self.window))[None, None]
            if real is not None:
                # rows end in padding, which attends to itself so as not to be NaN
                mask = mask & (real[:, None, None, first:end] | (key == at))
            if document is not None:
                same = document[:, start:stop, None] == document[:, None, first:end]
                mask = mask & same[:, None]
            o = F.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, first:end],
                v[:, :, first:end],
                attn_mask=mask,
                scale=self.scaling,
            )
            outputs.append(o)
        o = torch.cat(outputs, dim=2) if outputs else q
        return o.transpose(1, 2).flatten(2)

    def _angles(self, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (1, S, R) of the places of k (B, H_kv, S, K), counted from its first.

        In float64 up to the cosine: where counting starts must not matter.
        """
        assert self.rotary_embedding is not None
        place = torch.arange(k.shape[2], device=k.device, dtype=torch.float64)
        angle = torch.outer(place, self.rotary_embedding.inv_freq.double()).repeat(1, 2)[None]
        scaling = self.rotary_embedding.attention_scaling
        return (angle.cos() * scaling).to(k.dtype), (angle.sin() * scaling).to(k.dtype)

    def mixing_flops(self, context: int) -> float:
        """Logits and weighted sum over the tokens of the window, fewer at the start."""
        short = min(context, self.window)
        seen = (short * (short + 1) / 2 + (context - short) * self.window) / context
        return 2.0 * 2.0 * self.num_heads * self.head_dim * seen

    def state_elements(self) -> tuple[int, int]:
        """W - 1 keys and values, and a mark for each."""
        return 0, (self.window - 1) * (2 * self.num_kv_heads * self.head_dim + 1)


class _Rows:
    """Documents packed in one row, spread out to a row each and back; whole rows stay as they are."""

    def __init__(self, cu_seqlens: torch.Tensor | None, x: torch.Tensor) -> None:
        self.lengths: torch.Tensor | None = None
        if cu_seqlens is None:
            return
        bounds = cu_seqlens.long()
        self.lengths = bounds[1:] - bounds[:-1]
        token = torch.arange(x.shape[1], device=x.device)
        document = torch.searchsorted(bounds, token, right=True) - 1
        self.longest = int(self.lengths.max())
        self.place = document * self.longest + token - bounds[document]

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(1, tokens, C) -> (N, longest, C), zeros after the end of each."""
        if self.lengths is None:
            return x
        flat = x.new_zeros(len(self.lengths) * self.longest, x.shape[2])
        return flat.index_copy(0, self.place, x[0]).view(-1, self.longest, x.shape[2])

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """(N, longest, C) -> (1, tokens, C)."""
        return x if self.lengths is None else x.flatten(0, 1)[self.place][None]
