"""GateLoop: a data-controlled complex decay per key channel (arXiv 2311.01927)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.config.declare import Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.linear_mixer import LinearMixer
from hybrid.mixers.parts import HeadOptions, to_float32, too_wide
from hybrid.mixers.rotation import rotate, rotate_state, running_angle
from hybrid.nn.past import Slot, StateSpec


@dataclass(frozen=True)
class GateLoopOptions(HeadOptions):
    """Options of ``gateloop``.

    Attributes:
        num_heads: H; default D / 64, at least 1. The best model of the paper has one head per channel
            (``num_heads: D``), each with one complex number as its state.
        head_dim: complex key channels K; default V, or D / H.
        value_head_dim: value dim V; default K.
        conv_size: width of a short convolution on q, k, v; null for no convolution, as in the paper.
    """

    conv_size: Size2 | None = None

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes; a complex channel counts twice."""
        lines = super().problems(sizes)
        done = self.complete(sizes.hidden_size)
        if not lines and done.head_dim is not None:
            lines += too_wide(**{"head_dim, twice": 2 * done.head_dim})
        return lines


@register_mixer("gateloop", symbol="O")
class GateLoop(LinearMixer):
    """GateLoop mixer (arXiv 2311.01927, eq. 6 to 9).

    S_t = a_t * S_{t-1} + k_t v_t^T is complex, with a_t = sigmoid(x W_a1) exp(i x W_a2) per key channel.
    o_t = Re(q_t^T S_t), gated by silu(x W_g). q, k, v are real. For the op, a complex channel is a pair
    of real channels, and q and k are rotated by the cumulative sum of the phases.
    """

    Options = GateLoopOptions
    paper = "arXiv 2311.01927"
    formula = "G_t = alpha_t^T 1, alpha_t = sigmoid(x_t W_1) exp(i x_t W_2)"
    used_by = "GateLoop"

    def __init__(self, options: GateLoopOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.build(heads, key_dim, value_dim, options.conv_size, conv_activation="silu")
        self.decay_proj = nn.Linear(sizes.hidden_size, heads * key_dim)
        self.phase_proj = nn.Linear(sizes.hidden_size, heads * key_dim)
        self.gate_proj = nn.Linear(sizes.hidden_size, heads * value_dim)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return matrix states with a convolution; and one head per channel as in the paper."""
        return [
            {"num_heads": 2, "head_dim": 5, "value_head_dim": 7, "conv_size": 3},
            {"num_heads": 8, "head_dim": 1, "value_head_dim": 1},
        ]

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        q, k, v = self.project(x, cu_seqlens, cache)
        log_decay = F.logsigmoid(to_float32(self.decay_proj(x))).unflatten(-1, (self.num_heads, -1))
        phase = to_float32(self.phase_proj(x)).unflatten(-1, (self.num_heads, -1))
        angle, last = running_angle(phase, cu_seqlens)
        # a real number is a pair whose imaginary half is zero
        q, k = (rotate(F.pad(y, (0, y.shape[-1])), angle) for y in (q, k))
        o = self.recur(
            q,
            k,
            v,
            cu_seqlens,
            cache,
            carry=lambda state: rotate_state(state, -last),
            log_decay=torch.cat([log_decay] * 2, dim=-1),
        )
        return self.o_proj(o.flatten(-2) * F.silu(self.gate_proj(x)))

    def mixing_flops(self, context: int) -> float:
        """Count each complex channel as two real channels."""
        return 2 * super().mixing_flops(context)

    def states(self) -> dict[str, StateSpec]:
        """Return one complex K x V state per head, stored as a real state with 2 K rows."""
        shape = (self.num_heads, 2 * self.key_dim, self.value_dim)
        return {**super().states(), "recurrent": StateSpec(shape, torch.float32)}
