"""Softmax attention: MHA, GQA, MQA through transformers' attention interface.

Shapes: B batch, T time, H query heads, H_kv key heads, K head dim, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from hybrid.cache import LayerCache
from hybrid.mixers.attention import (
    CAPPED_FUNCTIONS,
    PLAIN_FUNCTIONS,
    add_positions,
    alibi_slopes,
    capped_attention,
)
from hybrid.mixers.base import (
    Mixer,
    MixerOptions,
    ShortConvolution,
    conv_problems,
    head_problems,
    residual_projection,
)
from hybrid.mixers.parts import positive
from hybrid.norms import build_norm
from hybrid.registry import register_mixer
from hybrid.rotary import RotaryEmbedding, apply_rotary, rope_problems
from hybrid.segments import WHOLE_ROWS, Segments

if TYPE_CHECKING:
    from hybrid.config import HybridConfig


@dataclass(frozen=True)
class SoftmaxAttentionOptions(MixerOptions):
    """Options of `softmax_attention`.

    Attributes:
        num_heads: query heads H; default D / 64, at least 1.
        num_kv_heads: key and value heads; default H (MHA); 1 is MQA; must divide H.
        head_dim: K; default D / H.
        rope_parameters: transformers' own rope dictionary (`rope_type`, `rope_theta`,
            `partial_rotary_factor`, and what the type needs); null for no positions (NoPE).
        qk_norm: RMSNorm of q and k: `head` (over K, one weight for all heads, Qwen3), `layer` (over
            all heads together, OLMo 2), or null.
        conv_size: width of a short causal convolution on q, k, v (Primer, arXiv 2109.08668); null for
            none.
        bias: biases on q, k, v.
        output_bias: bias on the output projection.
        dropout: probability, on the attention weights in training.
        scale: of the logits; default K ** -0.5.
        output_gate: multiply the output by sigmoid(x W_g), per channel (arXiv 2505.06708; Qwen3-Next).
        sinks: a learned logit per head that takes part in the softmax and adds nothing (GPT-OSS), so
            that a head may attend to nothing.
        soft_cap: logits z become c tanh(z / c) (Gemma 2, arXiv 2408.00118); null for no cap.
        alibi: add -m_h (t - s) to the logits (arXiv 2108.12409); wants rope_parameters null.
        nope_every: no positions in every n-th softmax layer of the stack, from the n-th on (RNoPE,
            arXiv 2501.18795; SmolLM3); null for positions in all.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_parameters: dict | None = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    qk_norm: Literal["head", "layer"] | None = None
    conv_size: int | None = None
    bias: bool = False
    output_bias: bool = False
    dropout: float = 0.0
    scale: float | None = None
    output_gate: bool = False
    sinks: bool = False
    soft_cap: float | None = None
    alibi: bool = False
    nope_every: int | None = None

    def complete(self, hidden_size: int) -> SoftmaxAttentionOptions:
        """Fill in heads and dims."""
        heads = self.num_heads
        if heads is None:
            heads = max(1, hidden_size // (self.head_dim or 64))
        return replace(
            self,
            num_heads=heads,
            num_kv_heads=heads if self.num_kv_heads is None else self.num_kv_heads,
            head_dim=hidden_size // max(1, heads) if self.head_dim is None else self.head_dim,
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, H_kv, K of completed options."""
        assert self.num_heads is not None
        assert self.num_kv_heads is not None
        assert self.head_dim is not None
        return self.num_heads, self.num_kv_heads, self.head_dim

    def problems(self, config: HybridConfig) -> list[str]:
        """Sizes that do not fit together."""
        heads, kv_heads, head_dim = self.complete(config.hidden_size).sizes
        lines = head_problems(
            config.hidden_size,
            heads,
            head_dim=self.head_dim,
            num_kv_heads=self.num_kv_heads,
        )
        if self.head_dim is None and self.num_kv_heads is not None and not lines:
            lines = head_problems(config.hidden_size, heads)
        if not lines and heads % kv_heads:
            lines.append(f"num_kv_heads: {kv_heads} does not divide num_heads {heads}")
        if not 0.0 <= self.dropout < 1.0:
            lines.append(f"dropout: must be in [0, 1), found {self.dropout}")
        if self.rope_parameters is not None:
            rope = rope_problems(self.rope_parameters, max(2, head_dim), config)
            # with heads that do not fit, what it says of their size would be a second complaint
            lines += [line for line in rope if not lines or line.startswith("rope_parameters.")]
        lines += positive(soft_cap=self.soft_cap, nope_every=self.nope_every)
        if self.alibi and self.rope_parameters is not None:
            lines.append("alibi: takes the place of rotary positions; set rope_parameters to null")
        if self.alibi and (self.sinks or self.soft_cap is not None):
            lines.append("alibi: does not go with sinks or soft_cap")
        return lines + conv_problems(self.conv_size)


@register_mixer("softmax_attention", symbol="S")
class SoftmaxAttention(Mixer):
    """Causal softmax attention with grouped heads.

    o_t = sum_{s <= t} softmax_s(scale * q_t . k_s) v_s (arXiv 1706.03762, eq. 1); grouped heads
    after arXiv 2305.13245, rotary positions after arXiv 2104.09864. The attention itself is
    transformers' (`attn_implementation`: eager, sdpa, flash_attention_2, flex_attention, ...).
    """

    Options = SoftmaxAttentionOptions
    layer_type = "full_attention"
    paper = "arXiv 1706.03762; grouped heads arXiv 2305.13245"
    formula = "o_t = sum_s softmax_s(scale q_t . k_s) v_s, s <= t"
    used_by = "Llama, Qwen3, and a share of the layers of nearly every hybrid"
    is_causal = True

    def __init__(
        self, options: SoftmaxAttentionOptions, config: HybridConfig, layer_idx: int
    ) -> None:
        super().__init__(options, config, layer_idx)
        d_model = config.hidden_size
        self.num_heads, self.num_kv_heads, self.head_dim = options.sizes
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.scaling = self.head_dim**-0.5 if options.scale is None else options.scale
        inner, inner_kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, inner, bias=options.bias)
        self.k_proj = nn.Linear(d_model, inner_kv, bias=options.bias)
        self.v_proj = nn.Linear(d_model, inner_kv, bias=options.bias)
        self.o_proj = residual_projection(inner, d_model, bias=options.output_bias)
        self.conv = None
        if options.conv_size:
            self.conv = ShortConvolution(inner + 2 * inner_kv, options.conv_size)
        self.gate_proj = (
            nn.Linear(d_model, inner, bias=options.bias) if options.output_gate else None
        )
        self.sinks = nn.Parameter(torch.empty(self.num_heads)) if options.sinks else None
        self.slopes = nn.Buffer(self._slopes(), persistent=False) if options.alibi else None
        self.has_positions = self._has_positions()
        self.q_norm = self.k_norm = None
        if options.qk_norm:
            sizes = (self.head_dim,) * 2 if options.qk_norm == "head" else (inner, inner_kv)
            self.q_norm, self.k_norm = (build_norm("rmsnorm", n, config.norm_eps) for n in sizes)

    def _slopes(self) -> torch.Tensor:
        return torch.tensor(alibi_slopes(self.num_heads))

    def _has_positions(self) -> bool:
        """Whether this is not one of the every n-th softmax layers that go without."""
        every = self.options.nope_every
        if every is None:
            return True
        kinds = [
            any(issubclass(self.config.mixer(s)[0], SoftmaxAttention) for s in layer.mixers)
            for layer in self.config.layers[: self.layer_idx + 1]
        ]
        return sum(kinds) % every != 0

    def init_parameters(self, std: float) -> None:
        """Sinks normal; slopes are a function of the config."""
        if self.sinks is not None:
            init.normal_(self.sinks, mean=0.0, std=std)
        if self.slopes is not None:
            init.copy_(self.slopes, self._slopes())

    @classmethod
    def uses_state(cls, options: SoftmaxAttentionOptions) -> bool:
        """Only the convolution has one."""
        return options.conv_size is not None

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """MHA with RoPE; GQA, partial RoPE, QK-norm, sinks and cap; MQA, ALiBi; a convolution, NoPE."""
        partial = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
        return [
            {"num_heads": 2},
            {"num_heads": 4, "num_kv_heads": 2, "rope_parameters": partial, "qk_norm": "head",
             "sinks": True, "soft_cap": 3.0},
            {"num_heads": 3, "num_kv_heads": 1, "head_dim": 10, "rope_parameters": None,
             "qk_norm": "layer", "bias": True, "output_bias": True, "alibi": True},
            {"num_heads": 2, "num_kv_heads": 1, "conv_size": 3, "output_gate": True,
             "nope_every": 2},
        ]  # fmt: skip

    @classmethod
    def rotary(cls, options: SoftmaxAttentionOptions, config: HybridConfig) -> nn.Module | None:
        """The rotary embedding of these options; None for NoPE."""
        if options.rope_parameters is None:
            return None
        return RotaryEmbedding(
            options.rope_parameters, options.sizes[2], config.max_position_embeddings
        )

    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        segments: Segments = WHOLE_ROWS,
        cache: LayerCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Mixer.forward`."""
        batch, time, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv is not None:
            if cache is not None:
                qkv = torch.cat([q, k, v], dim=-1)
                conv = self.conv
                cache.resume(qkv, segments, lambda again: conv(again, None, cache))
            packed = [segments.pack(y) for y in (q, k, v)]
            convolved = self.conv.split(packed, segments.cu_seqlens, cache)
            q, k, v = (segments.unpack(y, batch, time) for y in convolved)
        q, k, v = self._heads(q, self.q_norm), self._heads(k, self.k_norm), self._heads(v, None)
        if position_embeddings is not None and self.has_positions:
            q, k = apply_rotary(q, k, *position_embeddings)
        if self.slopes is not None and self.has_positions:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(time, device=x.device)[None]
            q, k = add_positions(q, k, positions, self.slopes, self.scaling)
        if cache is not None:
            k, v = cache.update_kv(k, v)
        o, weights = self._attend(q, k, v, attention_mask, kwargs)
        o = o.reshape(batch, time, -1)
        if self.gate_proj is not None:
            o = o * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(o), weights

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """o (B, T, H, K) by the attention function of the config, or ours where it lacks something."""
        name = self.config._attn_implementation or "eager"
        dropout = self.options.dropout if self.training else 0.0
        extra: dict[str, Any] = {}
        if self.sinks is not None or self.options.soft_cap is not None:
            if name in PLAIN_FUNCTIONS:
                return capped_attention(
                    q,
                    k,
                    v,
                    mask,
                    scaling=self.scaling,
                    soft_cap=self.options.soft_cap,
                    sinks=self.sinks,
                    dropout=dropout,
                )
            if name not in CAPPED_FUNCTIONS:
                raise ValueError(
                    f"attn_implementation {name!r} knows no sinks and no soft_cap; these do:"
                    f" {', '.join(PLAIN_FUNCTIONS + CAPPED_FUNCTIONS)}"
                )
            extra = {"softcap": self.options.soft_cap, "s_aux": self.sinks}
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        return attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **extra, **kwargs)

    def _heads(self, y: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """(B, T, H * K) -> (B, H, T, K), normalised per layer or per head."""
        if norm is not None and self.options.qk_norm == "layer":
            y = norm(y)
        y = y.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.options.qk_norm == "head":
            y = norm(y)
        return y.transpose(1, 2)

    def mixing_flops(self, context: int) -> float:
        """Logits and weighted sum over the (context + 1) / 2 tokens a token sees on average."""
        return 2.0 * 2.0 * self.num_heads * self.head_dim * (context + 1) / 2

    def cache_elements_per_token(self) -> int:
        """Keys and values, and with ALiBi the position, in two numbers, per key head."""
        positions = 2 if self.slopes is not None and self.has_positions else 0
        return self.num_kv_heads * (2 * self.head_dim + positions)

    def state_elements(self) -> tuple[int, int]:
        """The convolution's."""
        return 0, self.conv.state_elements() if self.conv is not None else 0
