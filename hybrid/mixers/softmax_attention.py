"""Softmax attention: MHA, GQA, MQA through transformers' attention interface.

Shapes: B batch, T time, H query heads, H_kv key heads, K head dim, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hybrid.config.declare import Positive, Size, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.attention import FullAttention, add_positions, capped_attention
from hybrid.mixers.dual_chunk import (
    CHUNK_MARKS,
    DualChunkAngles,
    DualChunkRotaryEmbedding,
    dual_chunk_attention,
    mark_chunks,
    read_chunks,
)
from hybrid.mixers.grouped_heads import GroupedHeadOptions, GroupedHeads
from hybrid.mixers.parts import to_float32
from hybrid.mixers.short_convolution import ShortConvolution
from hybrid.nn.packing import WHOLE_ROWS, Segments
from hybrid.nn.past import Slot, StateSpec, TokenSpec
from hybrid.nn.rotary import BY_LENGTH, apply_rotary


@dataclass(frozen=True)
class SoftmaxAttentionOptions(GroupedHeadOptions):
    """Options of ``softmax_attention``, in addition to those of ``GroupedHeadOptions``.

    Attributes:
        conv_size: width of a short causal convolution on q, k, v (Primer, arXiv 2109.08668); null for
            no convolution.
        nope_every: n; every n-th softmax layer of the stack has no positions (RNoPE, arXiv 2501.18795;
            SmolLM3); null for positions in all layers.
        temperature: a; queries are scaled by 1 + a ln(1 + floor((t + offset) / n)), which keeps the
            softmax sharp over many keys (arXiv 2501.19399; Llama 4, Ministral 3); null for no scaling.
            With ``nope_every``, only layers without positions are scaled.
        temperature_length: n, tokens per step of the temperature (``floor_scale`` of Llama 4).
        temperature_offset: offset of t; 1 in Llama 4, 0 in Ministral 3.
        dual_chunk_size: s, chunk size of dual chunk attention (arXiv 2402.17463); null for plain
            positions. At inference, distances beyond the training length are mapped to positions seen
            in training, chunk by chunk. Training does not use it.
        dual_chunk_window: w, tokens before a chunk that keep their true distance. The largest distance
            is s + w - 1. Default s / 3, for s equal to 3/4 of the training length.
    """

    conv_size: Size2 | None = None
    nope_every: Size | None = None
    temperature: Positive | None = None
    temperature_length: Size = 8192
    temperature_offset: Literal[0, 1] = 1
    dual_chunk_size: Size | None = None
    dual_chunk_window: Size | None = None

    @property
    def dual_chunk(self) -> tuple[int, int] | None:
        """s and w of dual chunk attention; None if it is off."""
        if self.dual_chunk_size is None:
            return None
        window = self.dual_chunk_window
        return self.dual_chunk_size, max(1, self.dual_chunk_size // 3) if window is None else window

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes."""
        return super().problems(sizes) + self._dual_chunk_problems()

    def _dual_chunk_problems(self) -> list[str]:
        if self.dual_chunk_size is None:
            if self.dual_chunk_window is None:
                return []
            return [
                "dual_chunk_window: expected null without dual_chunk_size, got"
                f" {self.dual_chunk_window}; try setting dual_chunk_size"
            ]
        if self.rope_parameters is None:
            return [
                "dual_chunk_size: expected rope_parameters, as dual chunks change rotary positions, got"
                " null; try setting rope_parameters"
            ]
        kind, window = self.rope_parameters.get("rope_type", "default"), self.dual_chunk_window
        if window is not None and window > self.dual_chunk_size:
            at_most = f"at most dual_chunk_size {self.dual_chunk_size}"
            return [f"dual_chunk_window: expected {at_most}, got {window}"]
        if kind in BY_LENGTH:
            return [
                "dual_chunk_size: expected a rope_type that does not depend on the sequence length, got"
                f" {kind!r}; try 'default'"
            ]
        return []


@register_mixer("softmax_attention", symbol="S")
class SoftmaxAttention(GroupedHeads, FullAttention):
    """Causal softmax attention mixer with grouped heads.

    o_t = sum_{s <= t} softmax_s(scale * q_t . k_s) v_s (arXiv 1706.03762, eq. 1), with grouped heads
    (arXiv 2305.13245) and rotary positions (arXiv 2104.09864). transformers computes the attention
    (``attn_implementation``: eager, sdpa, flash_attention_2, flex_attention, ...).
    """

    Options = SoftmaxAttentionOptions
    paper = "arXiv 1706.03762; grouped heads arXiv 2305.13245"
    formula = "o_t = sum_s softmax_s(scale q_t . k_s) v_s, s <= t"
    used_by = "Llama, Qwen3, and a share of the layers of nearly every hybrid"

    def __init__(self, options: SoftmaxAttentionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        self.build(options)
        self.conv = None
        if options.conv_size:
            inner = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
            self.conv = ShortConvolution(inner, options.conv_size)
        # every n-th softmax layer of the stack has no positions
        every = options.nope_every
        self.has_positions = every is None or (sizes.kind_idx + 1) % every != 0
        self.tuned = options.temperature is not None and not (every and self.has_positions)

    @classmethod
    def uses_state(cls, options: SoftmaxAttentionOptions) -> bool:
        """Return whether there is a convolution, the only part with a state."""
        return options.conv_size is not None

    @classmethod
    def fits_paged(cls, options: SoftmaxAttentionOptions) -> bool:
        """Return True for plain attention: no convolution, no extra dims of keys, no sinks, no cap."""
        beside = options.conv_size or options.alibi or options.dual_chunk_size
        return not (beside or options.sinks or options.soft_cap is not None)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return MHA; GQA with dual chunks, sinks, cap; MQA with ALiBi; convolution, gate, NoPE."""
        partial = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
        return [
            {"num_heads": 2},
            {"num_heads": 4, "num_kv_heads": 2, "rope_parameters": partial, "qk_norm": "head",
             "dual_chunk_size": 4, "dual_chunk_window": 2, "sinks": True, "soft_cap": 3.0},
            {"num_heads": 3, "num_kv_heads": 1, "head_dim": 10, "rope_parameters": None,
             "qk_norm": "layer", "bias": True, "output_bias": True, "alibi": True},
            {"num_heads": 2, "num_kv_heads": 1, "conv_size": 3, "output_gate": True, "sinks": True,
             "nope_every": 2, "temperature": 0.5, "temperature_length": 3,
             "qk_norm": "head", "qk_norm_type": "zero_centered_rmsnorm"},
        ]  # fmt: skip

    @classmethod
    def rotated_dim(cls, options: SoftmaxAttentionOptions) -> int:
        """Return the head dim K."""
        return options.sizes[2]

    @classmethod
    def rotary(cls, options: SoftmaxAttentionOptions, sizes: Sizes) -> nn.Module | None:
        """Return the rotary embedding of these options, with dual chunks if they are on."""
        if options.dual_chunk is None or options.rope_parameters is None:
            return super().rotary(options, sizes)
        return DualChunkRotaryEmbedding(
            options.rope_parameters,
            cls.rotated_dim(options),
            sizes.max_position_embeddings,
            *options.dual_chunk,
        )

    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | DualChunkAngles | None = None,
        segments: Segments = WHOLE_ROWS,
        cache: Slot | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``Mixer.forward``."""
        self.check_arguments(kwargs)
        q, k, v = self._project(x, segments, cache)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        if self.tuned:
            q = (q * self._temperature(positions, to_float32(q).dtype)).to(q.dtype)
        if self.slopes is not None and self.has_positions:
            q, k = add_positions(q, k, positions, self.slopes, self.scaling)
        angles = position_embeddings if self.has_positions else None
        if isinstance(angles, DualChunkAngles):
            o, weights = self._in_chunks(q, k, v, angles, attention_mask, cache)
            return self.output(o.flatten(2), x), weights
        if angles is not None:
            q, k = apply_rotary(q, k, *angles)
        if cache is not None:
            k, v = cache.append(k=k, v=v)
        if self.slopes is not None and self.attention_name == "eager":
            # transformers' eager attention rounds logits to the dtype of q, and positions are large
            q, k = to_float32(q), to_float32(k)
            o, weights = capped_attention(
                q, k, v, attention_mask, scaling=self.scaling, dropout=self.active_dropout
            )
            return self.output(o.flatten(2), x), weights
        caps = {"soft_cap": self.options.soft_cap, "sinks": self.sink_logits}
        o, weights = self.attend(q, k, v, attention_mask, kwargs, **caps)
        return self.output(o.flatten(2), x), weights

    def _project(
        self, x: torch.Tensor, segments: Segments, cache: Slot | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project x (B, T, D) to q (B, H, T, K), k and v (B, H_kv, T, K); convolve and normalise."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv is not None:
            batch, time, _ = x.shape
            if cache is not None:
                qkv = torch.cat([q, k, v], dim=-1)
                conv = self.conv
                cache.begin(qkv, segments, lambda again: conv(again, None, cache))
            packed = [segments.pack(y) for y in (q, k, v)]
            convolved = self.conv.split(packed, segments.cu_seqlens, cache)
            q, k, v = (segments.unpack(y, batch, time) for y in convolved)
        return (
            self.split_heads(q, self.q_norm),
            self.split_heads(k, self.k_norm),
            self.split_heads(v),
        )

    def _temperature(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return 1 + a ln(1 + floor((t + offset) / n)) of positions (B, T), as (B, 1, T, 1)."""
        options = self.options
        steps = torch.div(
            positions + options.temperature_offset,
            options.temperature_length,
            rounding_mode="floor",
        )
        return (1 + options.temperature * torch.log1p(steps.to(dtype)))[:, None, :, None]

    def _in_chunks(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: DualChunkAngles,
        mask: torch.Tensor | None,
        cache: Slot | None,
    ) -> tuple[torch.Tensor, None]:
        """Apply dual chunk attention; the cache holds rotated keys and their chunks."""
        self.require_plain("dual chunks")
        queries, k = angles.rotate(q, k)
        k = mark_chunks(k, angles.chunk)
        if cache is not None:
            k, v = cache.append(k=k, v=v)
        k, chunk = read_chunks(k)
        return dual_chunk_attention(
            queries, k, v, angles.chunk, chunk, mask,
            scaling=self.scaling, soft_cap=self.options.soft_cap, sinks=self.sink_logits,
        )  # fmt: skip

    def mixing_flops(self, context: int) -> float:
        """Count logits and weighted sum over a mean of (context + 1) / 2 tokens."""
        return self.logits_flops((context + 1) / 2)

    def tokens(self) -> dict[str, TokenSpec]:
        """Return keys and values; keys have two extra dims each for ALiBi and dual chunks."""
        marks = 0
        if self.has_positions:
            marks = 2 * (self.slopes is not None) + CHUNK_MARKS * bool(self.options.dual_chunk)
        k = TokenSpec(self.num_kv_heads, self.head_dim + marks)
        return {"k": k, "v": TokenSpec(self.num_kv_heads, self.head_dim)}

    def states(self) -> dict[str, StateSpec]:
        """Return the state of the convolution, if any."""
        return self.conv.states() if self.conv is not None else {}
