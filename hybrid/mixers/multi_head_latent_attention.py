"""Multi-head latent attention: keys and values from one cached latent (DeepSeek-V2, arXiv 2405.04434).

Shapes: B batch, T queries, S keys, H heads, R latent dim, P rotated dims of a key, N other dims of a
key, V value dim, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hybrid.config.declare import Below1, Positive, Size
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.attention import FullAttention
from hybrid.mixers.base import MixerOptions
from hybrid.mixers.parts import plain_weight, to_float32
from hybrid.nn.norms import build_norm
from hybrid.nn.packing import WHOLE_ROWS, Segments
from hybrid.nn.past import Slot, TokenSpec
from hybrid.nn.rotary import apply_rotary, rope_problems, yarn_mscale


@dataclass(frozen=True)
class MultiHeadLatentAttentionOptions(MixerOptions):
    """Options of ``multi_head_latent_attention``.

    Attributes:
        num_heads: H; default D / 128, at least 1.
        latent_dim: R, dim of the latent of keys and values; default 4 V.
        query_latent_dim: dim of a latent of queries; null for a full projection.
        head_dim: N, dims of a head's key that are projected from the latent.
        rope_dim: P, further dims of a head's query, for the key shared by all heads.
        value_head_dim: V.
        rope_parameters: RoPE dictionary of transformers, for the P dims; null for no rotation (Kimi
            Linear).
        scale: factor of the logits; default (N + P) ** -0.5, times YaRN's mscale squared if
            rope_parameters has ``mscale_all_dim`` (DeepSeek-V2, V3).
        dropout: dropout probability of the attention weights in training.
        latent_norm_eps: epsilon of the norms of both latents; default the model's ``norm_eps``.
            Published models use 1e-6 here, independent of their other norms.
        output_gate: multiply a head's output by sigmoid(w x), one number per head (Ling 3.0; per
            channel in arXiv 2505.06708).
    """

    num_heads: Size | None = None
    latent_dim: Size | None = None
    query_latent_dim: Size | None = None
    head_dim: Size = 128
    rope_dim: Size = 64
    value_head_dim: Size = 128
    rope_parameters: dict | None = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    scale: Positive | None = None
    dropout: Below1 = 0.0
    latent_norm_eps: Positive | None = None
    output_gate: bool = False

    def complete(self, hidden_size: int) -> MultiHeadLatentAttentionOptions:
        """Return these options with heads and the latent dim filled in."""
        return replace(
            self,
            num_heads=max(1, hidden_size // 128) if self.num_heads is None else self.num_heads,
            latent_dim=4 * self.value_head_dim if self.latent_dim is None else self.latent_dim,
        )

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mistake in ``rope_parameters``."""
        if self.rope_parameters is None:
            return []
        return rope_problems(self.rope_parameters, self.rope_dim, sizes)


@register_mixer("multi_head_latent_attention", symbol="A")
class MultiHeadLatentAttention(FullAttention):
    """Multi-head latent attention mixer (arXiv 2405.04434, eq. 9 to 19).

    Softmax attention with [k_N, v] = c W_b, where c = RMSNorm(x W_a) is a latent of dim R, and a key k_P
    shared by all heads: q = [q_N, q_P], k = [k_N, k_P]. q_P and k_P are rotated.

    Only c and k_P are cached: R + P numbers per token, independent of H. In decode, a single token
    attends to the latents directly, with W_b absorbed into the query if ``plain_weight`` returns it:
    q_N . k_N = (q_N W_bk^T) . c. The values are then projected from the weighted mean of the latents.

    Rotated pairs are (j, j + P/2). DeepSeek's are (2j, 2j + 1), which is the same up to a permutation of
    rows.
    """

    Options = MultiHeadLatentAttentionOptions
    paper = "arXiv 2405.04434"
    formula = "o_t = sum_s softmax_s(scale q_t . k_s) v_s, k_s and v_s linear in a latent c_s"
    used_by = "DeepSeek-V2, V3, Kimi K2, Kimi Linear, Ling 3.0"
    absorb: bool | None = None
    """Whether queries attend to the latents; None: only for a single query, where it is faster."""

    def __init__(
        self, options: MultiHeadLatentAttentionOptions, sizes: Sizes, layer_idx: int
    ) -> None:
        super().__init__(options, sizes, layer_idx)
        assert options.num_heads is not None
        assert options.latent_dim is not None
        d_model, heads = sizes.hidden_size, options.num_heads
        self.num_heads, self.latent_dim = heads, options.latent_dim
        self.head_dim, self.rope_dim = options.head_dim, options.rope_dim
        self.value_dim = options.value_head_dim
        key_dim = self.head_dim + self.rope_dim
        self.scaling = options.scale
        if self.scaling is None:
            self.scaling = key_dim**-0.5 * yarn_mscale(options.rope_parameters) ** 2
        query_dim = d_model if options.query_latent_dim is None else options.query_latent_dim
        eps = sizes.norm_eps if options.latent_norm_eps is None else options.latent_norm_eps
        self.q_down_proj = self.q_norm = None
        if options.query_latent_dim is not None:
            self.q_down_proj = nn.Linear(d_model, query_dim, bias=False)
            self.q_norm = build_norm("rmsnorm", query_dim, eps)
        self.q_proj = nn.Linear(query_dim, heads * key_dim, bias=False)
        self.kv_down_proj = nn.Linear(d_model, self.latent_dim + self.rope_dim, bias=False)
        self.kv_norm = build_norm("rmsnorm", self.latent_dim, eps)
        # one block of N + V rows per head
        self.kv_proj = nn.Linear(
            self.latent_dim, heads * (self.head_dim + self.value_dim), bias=False
        )
        self.gate_proj = nn.Linear(d_model, heads, bias=False) if options.output_gate else None
        self.o_proj = nn.Linear(heads * self.value_dim, d_model, bias=False)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return options like DeepSeek-V2; Kimi Linear, without positions; Ling 3.0, with a gate."""
        small = {"num_heads": 2, "latent_dim": 12, "head_dim": 6, "rope_dim": 4}
        return [
            {**small, "value_head_dim": 5, "query_latent_dim": 10},
            {**small, "value_head_dim": 8, "rope_parameters": None, "scale": 0.5},
            {**small, "value_head_dim": 7, "output_gate": True},
        ]

    @classmethod
    def rotated_dim(cls, options: MultiHeadLatentAttentionOptions) -> int:
        """Return P."""
        return options.rope_dim

    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        segments: Segments = WHOLE_ROWS,
        cache: Slot | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``Mixer.forward``."""
        self.check_arguments(kwargs)
        q = x
        if self.q_down_proj is not None and self.q_norm is not None:
            q = self.q_norm(self.q_down_proj(x))
        q = self.q_proj(q).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q, q_place = q.split([self.head_dim, self.rope_dim], dim=-1)
        latent, place = self.kv_down_proj(x).split([self.latent_dim, self.rope_dim], dim=-1)
        latent, place = self.kv_norm(latent).unsqueeze(1), place.unsqueeze(1)
        if position_embeddings is not None:
            q_place, place = apply_rotary(q_place, place, *position_embeddings)
        if cache is not None:
            latent, place = cache.append(k=latent, v=place)
        absorb = x.shape[1] == 1 if self.absorb is None else self.absorb
        up = plain_weight(self.kv_proj) if absorb else None
        inputs = (q, q_place, latent, place, attention_mask, kwargs)
        o, weights = self._expanded(*inputs) if up is None else self._absorbed(up, *inputs)
        if self.gate_proj is not None:
            o = o * torch.sigmoid(to_float32(self.gate_proj(x))).to(o.dtype).unsqueeze(-1)
        return self.o_proj(o.flatten(2)), weights

    def _expanded(
        self,
        q: torch.Tensor,
        q_place: torch.Tensor,
        latent: torch.Tensor,
        place: torch.Tensor,
        mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return o (B, T, H, V), with the keys and values of every head projected from the latents."""
        kv = self.kv_proj(latent[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = kv.split([self.head_dim, self.value_dim], dim=-1)
        k = torch.cat([k, place.expand(-1, self.num_heads, -1, -1)], dim=-1)
        return self.attend(torch.cat([q, q_place], dim=-1), k, v, mask, kwargs)

    def _absorbed(
        self,
        up: torch.Tensor,
        q: torch.Tensor,
        q_place: torch.Tensor,
        latent: torch.Tensor,
        place: torch.Tensor,
        mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return o (B, T, H, V) by multi-query attention to latents; ``up``: weight of kv_proj."""
        up = up.unflatten(0, (self.num_heads, -1))
        to_key, to_value = up.split([self.head_dim, self.value_dim], dim=1)
        q = torch.cat([torch.einsum("bhtn,hnr->bhtr", q, to_key), q_place], dim=-1)
        k = torch.cat([latent, place], dim=-1).expand(-1, self.num_heads, -1, -1)
        v = latent.expand(-1, self.num_heads, -1, -1)
        o, weights = self.attend(q, k, v, mask, kwargs)
        return torch.einsum("bthr,hvr->bthv", o, to_value), weights

    def mixing_flops(self, context: int) -> float:
        """Count expanded logits and weighted sum over a mean of (context + 1) / 2 tokens."""
        width = self.head_dim + self.rope_dim + self.value_dim
        return 2.0 * self.num_heads * width * (context + 1) / 2

    def tokens(self) -> dict[str, TokenSpec]:
        """Return the latent as key, and the shared key as value."""
        return {"k": TokenSpec(1, self.latent_dim), "v": TokenSpec(1, self.rope_dim)}
