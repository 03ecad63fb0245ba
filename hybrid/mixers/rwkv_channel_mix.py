"""RWKV channel mixing: a feed-forward that also reads the previous token (arXiv 2404.05892)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.declare import Size
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.base import MixerOptions, StateMixer
from hybrid.mixers.parts import token_before
from hybrid.nn.past import Slot, StateSpec


@dataclass(frozen=True)
class RWKVChannelMixOptions(MixerOptions):
    """Options of ``rwkv_channel_mix``.

    Attributes:
        intermediate_size: inner width; default 3.5 D, rounded up to a multiple of 32.
    """

    intermediate_size: Size | None = None

    def complete(self, hidden_size: int) -> RWKVChannelMixOptions:
        """Return these options with the inner width filled in."""
        if self.intermediate_size is not None:
            return self
        return replace(self, intermediate_size=32 * -(-int(hidden_size * 3.5) // 32))

    @property
    def width(self) -> int:
        """Inner width of completed options."""
        assert self.intermediate_size is not None
        return self.intermediate_size


@register_mixer("rwkv_channel_mix")
class RWKVChannelMix(StateMixer):
    """RWKV channel mixing (arXiv 2404.05892, section 3.2).

    y = sigmoid(r) * (relu(k)^2 W_v), with k = (x_t + (x_{t-1} - x_t) * mu_k) W_k, and r likewise.

    It forms a layer of its own after each ``rwkv6``, in place of a feed-forward. It is a mixer because
    it has a state. It has no default letter. Bind one in the config: ``{"c": {"type":
    "rwkv_channel_mix"}}`` with the layout ``Rc``.
    """

    Options = RWKVChannelMixOptions
    paper = "arXiv 2404.05892"
    formula = "no decay: y_t = sigmoid(r_t) * W_v relu(k_t)^2, r_t and k_t from x_t and x_{t-1}"
    used_by = "RWKV-6 (Finch)"
    no_weight_decay = ("key_shift", "gate_shift")
    residual_projections = ("v_proj",)

    def __init__(self, options: RWKVChannelMixOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        d_model = sizes.hidden_size
        self.key_shift = nn.Parameter(torch.empty(d_model))
        self.gate_shift = nn.Parameter(torch.empty(d_model))
        self.k_proj = nn.Linear(d_model, options.width, bias=False)
        self.v_proj = nn.Linear(options.width, d_model, bias=False)
        self.gate_proj = nn.Linear(d_model, d_model, bias=False)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the default width; and another width."""
        return [{}, {"intermediate_size": 20}]

    def init_parameters(self, std: float) -> None:
        """Apply the published schedule over depth and channels to both shifts."""
        rest = 1 - self.layer_idx / (self.sizes.num_hidden_layers or 1)  # 1 to almost 0
        channel = torch.arange(self.sizes.hidden_size) / self.sizes.hidden_size
        for shift in (self.key_shift, self.gate_shift):
            init.copy_(shift, 1 - channel**rest)

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        step = token_before(x, cu_seqlens, cache) - x
        value = self.v_proj(F.relu(self.k_proj(x + step * self.key_shift)).square())
        return torch.sigmoid(self.gate_proj(x + step * self.gate_shift)) * value

    def mixing_flops(self, context: int) -> float:
        """Count the two interpolations and the gate."""
        return 5.0 * self.sizes.hidden_size

    def states(self) -> dict[str, StateSpec]:
        """Return the previous token."""
        return {"conv": StateSpec((self.sizes.hidden_size, 1))}
