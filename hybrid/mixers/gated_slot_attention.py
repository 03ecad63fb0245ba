"""Gated slot attention: softmax over a fixed number of memory slots (GSA, arXiv 2409.07146).

Shapes: B batch, T time, H heads, K key dim, V value dim, M slots, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.config.declare import Positive, Size, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.linear_mixer import FEATURE_MAPS, LinearMixer, OutputNorm
from hybrid.mixers.parts import HeadOptions, to_float32, too_wide
from hybrid.nn.past import Slot, StateSpec


@dataclass(frozen=True)
class GatedSlotAttentionOptions(HeadOptions):
    """Options of ``gated_slot_attention``.

    Attributes:
        num_heads: H; default D / 256, at least 1.
        head_dim: key dim K; default V, or D / H.
        value_head_dim: value dim V; default K.
        num_slots: M, slots per head, at most 256; default K, as published.
        tau: temperature of the decay sigmoid(.)^(1 / tau). A larger tau makes the decay closer to 1.
        conv_size: width of a short convolution on q, k, v; null for no convolution, as published.
        feature_map: of q and k, ``silu``, ``relu`` or ``identity``.
    """

    num_slots: Size | None = None
    tau: Positive = 8.0
    conv_size: Size2 | None = None
    feature_map: Literal["silu", "relu", "identity"] = "silu"

    width = 256

    def complete(self, hidden_size: int) -> GatedSlotAttentionOptions:
        """Return these options with heads, dims and slots filled in."""
        done = super().complete(hidden_size)
        assert isinstance(done, GatedSlotAttentionOptions)
        slots = done.head_dim if self.num_slots is None else self.num_slots
        return replace(done, num_slots=slots)

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each size that does not fit."""
        return super().problems(sizes) + too_wide(num_slots=self.num_slots)


@register_mixer("gated_slot_attention", symbol="g")
class GatedSlotAttention(LinearMixer):
    """Gated slot attention mixer (arXiv 2409.07146, section 3).

    Each of M slots holds a key and a value, and forgets at its own rate alpha_t (M)::

        Kt_t = diag(alpha_t) Kt_{t-1} + (1 - alpha_t) k_t^T         (M x K)
        Vt_t = diag(alpha_t) Vt_{t-1} + (1 - alpha_t) v_t^T         (M x V)
        o_t = Vt_t^T softmax(Kt_t q_t),    alpha_t = sigmoid(x_t W_f)^(1 / tau)

    q and k pass through a feature map, v through SiLU. The output is RMSNorm(silu(o)) over all heads.
    Two passes of the additive op: one reads the keys and decays over values (the slots), the other
    reads the values and decays over keys.
    """

    Options = GatedSlotAttentionOptions
    paper = "arXiv 2409.07146"
    formula = (
        "o_t = V_t^T softmax(K_t q_t); K_t and V_t: G_t = alpha_t^T 1, writes (1 - alpha_t) x_t^T"
    )
    used_by = "GSA"

    def __init__(self, options: GatedSlotAttentionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        assert options.num_slots is not None
        heads, key_dim, value_dim = options.sizes
        self.num_slots = options.num_slots
        self.build(heads, key_dim, value_dim, options.conv_size, conv_activation="silu")
        self.decay_proj = nn.Linear(sizes.hidden_size, heads * self.num_slots, bias=False)
        self.norm = OutputNorm("layer", heads, value_dim, sizes.norm_eps)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return options as published; unequal dims, few slots, a convolution; wide values."""
        return [
            {"num_heads": 2},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, "num_slots": 4, "conv_size": 4,
             "tau": 2.0, "feature_map": "relu"},
            {"num_heads": 1, "head_dim": 4, "value_head_dim": 258, "feature_map": "identity"},
        ]  # fmt: skip

    def features(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Apply the feature map to q and k, and SiLU to v."""
        feature_map = FEATURE_MAPS[self.options.feature_map]
        return feature_map(q), feature_map(k), F.silu(v)

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return log alpha (B, T, H, M)."""
        f = to_float32(self.decay_proj(x)).unflatten(-1, (self.num_heads, -1))
        return {"log_decay": F.logsigmoid(f) / self.options.tau}

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        q, k, v = self.project(x, cu_seqlens, cache)
        log_alpha = self.gates(x)["log_decay"]
        # 1 - alpha, exact for alpha close to 1; in the dtype of k, which the op takes it in
        write = (-torch.expm1(log_alpha)).to(k.dtype)
        keys = {"value_log_decay": log_alpha, "state": "slot_keys"}
        logits = self.recur(q, k, write, cu_seqlens, cache, **keys)
        weights = torch.softmax(to_float32(logits), dim=-1).to(v.dtype)
        values = {"log_decay": log_alpha, "state": "slot_values"}
        o = self.recur(weights, write, v, cu_seqlens, cache, **values)
        return self.o_proj(self.read(o, x))

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return RMSNorm(silu(o)) (B, T, H * V)."""
        return self.norm(F.silu(o))

    def mixing_flops(self, context: int) -> float:
        """Count decay, write and read of both memories: 1 + 2 + 2 FLOPs an element."""
        return 5.0 * self.num_heads * self.num_slots * (self.key_dim + self.value_dim)

    def states(self) -> dict[str, StateSpec]:
        """Return a key and a value per slot and head, and W - 1 inputs of the convolution."""
        conv = self.conv.states() if self.conv is not None else {}
        heads, slots = self.num_heads, self.num_slots
        return {
            "slot_keys": StateSpec((heads, self.key_dim, slots), torch.float32),
            "slot_values": StateSpec((heads, slots, self.value_dim), torch.float32),
            **conv,
        }
