"""Forgetting attention: softmax whose logits decay with the tokens in between (arXiv 2503.02130).

Shapes: B batch, T time, H query heads, H_kv key heads, K head dim, G = H / H_kv, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.attention import FullAttention
from hybrid.mixers.grouped_heads import GroupedHeadOptions, GroupedHeads
from hybrid.mixers.parts import to_float32
from hybrid.nn.packing import WHOLE_ROWS, Segments
from hybrid.nn.past import Slot, StateSpec, TokenSpec
from hybrid.nn.rotary import apply_rotary
from hybrid_kernels import linear_attention

PARTS = 3  # dims that hold one sum of log gates: three times bfloat16's 8 bits are float32's 24


@dataclass(frozen=True)
class ForgettingAttentionOptions(GroupedHeadOptions):
    """Options of ``forgetting_attention``: those of ``GroupedHeadOptions``.

    Without positions by default, as published. ``sinks``, ``soft_cap`` and ``alibi`` are refused.
    """

    rope_parameters: dict | None = None

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes and for options that exclude the gate."""
        given = {"sinks": self.sinks, "soft_cap": self.soft_cap, "alibi": self.alibi}
        return super().problems(sizes) + [
            f"{name}: expected none in forgetting_attention, whose logits hold the decay, got {value};"
            " try softmax_attention"
            for name, value in given.items()
            if value
        ]


@register_mixer("forgetting_attention", symbol="f")
class ForgettingAttention(GroupedHeads, FullAttention):
    """Forgetting attention mixer, FoX (arXiv 2503.02130, eq. 5).

    o_t = sum_{s <= t} softmax_s(scale * q_t . k_s + sum_{s < j <= t} log f_j) v_s, with a gate
    f_t = sigmoid(x W_f + b_f) per query head.

    The sum is c_t - c_s with c the running sum of log f, and softmax does not depend on c_t: -c_s is
    appended to the keys, in dims that the queries read with 1. Any attention function can be used. The
    running sum is a state, so that padding adds nothing to it and each document starts at 0.
    """

    Options = ForgettingAttentionOptions
    paper = "arXiv 2503.02130"
    formula = "o_t = sum_s softmax_s(scale q_t . k_s + sum_{s < j <= t} log f_j) v_s, s <= t"
    used_by = "Forgetting Transformer (FoX)"
    continues_packed = False

    def __init__(self, options: ForgettingAttentionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        self.build(options)
        self.forget_proj = nn.Linear(sizes.hidden_size, self.num_heads, bias=True)

    @classmethod
    def uses_state(cls, options: ForgettingAttentionOptions) -> bool:
        """Return True: the running sum."""
        return True

    @classmethod
    def tensor_splits(cls, options: Any) -> tuple[()]:
        """Return no splits: the running sum is of all heads."""
        return ()

    @classmethod
    def rotated_dim(cls, options: ForgettingAttentionOptions) -> int:
        """Return the head dim K."""
        return options.sizes[2]

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the options of the paper; grouped heads with positions, norm and gate."""
        rope = {"rope_type": "default", "rope_theta": 500.0}
        return [
            {"num_heads": 2},
            {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope_parameters": rope,
             "qk_norm": "head", "output_gate": True, "bias": True},
        ]  # fmt: skip

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
        batch, time, _ = x.shape
        if cache is not None:
            cache.begin(x, segments, lambda again: self._sums(again, None, cache))
        sums = self._sums(segments.pack(x), segments.cu_seqlens, cache)
        sums = segments.unpack(sums, batch, time)
        q = self.split_heads(self.q_proj(x), self.q_norm)
        k = self.split_heads(self.k_proj(x), self.k_norm)
        v = self.split_heads(self.v_proj(x))
        if position_embeddings is not None:
            q, k = apply_rotary(q, k, *position_embeddings)
        q, k = self._with_decay(q, k, sums)
        if cache is not None:
            k, v = cache.append(k=k, v=v)
        o, weights = self.attend(q, k, v, attention_mask, kwargs)
        return self.output(o.flatten(2), x), weights

    def _sums(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Return the running sums of log f of x (B, T, D), (B, T, H) in float32 or float64.

        The additive recurrence with one key and one value, both of dim 1.
        """
        log_f = F.logsigmoid(to_float32(self.forget_proj(x)))
        one = torch.ones_like(log_f[..., :1, None])
        before = None if cache is None else cache.state("log_forget")
        sums, after = linear_attention(
            one, one, log_f.unsqueeze(-1), scale=1.0, initial_state=before, cu_seqlens=cu_seqlens,
            output_final_state=cache is not None,
        )  # fmt: skip
        if cache is not None and after is not None:
            cache.set_state("log_forget", after)
        return sums.squeeze(-1)

    def _with_decay(
        self, q: torch.Tensor, k: torch.Tensor, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append dims: scaling q' . k' = scaling q . k - c_s, to q (B, H, T, K), k (B, H_kv, T, K).

        A key head has the sums of all G query heads that share it, and each of those reads its own.
        """
        groups = self.num_key_value_groups
        parts = _split(-sums / self.scaling, k.dtype).unflatten(2, (-1, groups)).flatten(3)
        own = torch.eye(groups, dtype=q.dtype, device=q.device).repeat_interleave(PARTS, dim=1)
        own = own.repeat(q.shape[1] // groups, 1)[:, None].expand(*q.shape[:3], -1)
        return torch.cat([q, own], dim=-1), torch.cat([k, parts.transpose(1, 2)], dim=-1)

    def mixing_flops(self, context: int) -> float:
        """Count logits, with the dims of the decay, and weighted sum over (context + 1) / 2 tokens."""
        extra = 2.0 * self.num_heads * PARTS * self.num_key_value_groups
        keys = (context + 1) / 2
        return self.logits_flops(keys) + extra * keys

    def tokens(self) -> dict[str, TokenSpec]:
        """Return keys, with the dims of the decay, and values."""
        extra = PARTS * self.num_key_value_groups
        k = TokenSpec(self.num_kv_heads, self.head_dim + extra)
        return {"k": k, "v": TokenSpec(self.num_kv_heads, self.head_dim)}

    def states(self) -> dict[str, StateSpec]:
        """Return the running sum of each query head."""
        return {"log_forget": StateSpec((self.num_heads, 1, 1), torch.float32)}


def _split(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Split x (...) into (..., 3) of ``dtype`` that add up to x; the gradient is that of the sum."""
    first = x.detach().bfloat16().to(x.dtype)
    second = (x.detach() - first).bfloat16().to(x.dtype)
    third = x - first - second
    return torch.stack([first, second, third], dim=-1).to(dtype)
