"""Comba: the delta rule with feedback of the state and of the output (arXiv 2506.02475).

Shapes: B batch, T time, H heads, H_k key heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from hybrid.config.declare import Number
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.delta_net import DeltaRuleOptions, ScalarDecayDeltaRule
from hybrid.mixers.parts import to_float32
from hybrid.nn.past import Slot

# Weakest decay: its exp is nothing beside 1 in float32 and float64, and the inverse finite in both.
CLOSED = -40.0


@dataclass(frozen=True)
class CombaOptions(DeltaRuleOptions):
    """Options of ``comba``: those of the delta rule, and

    Attributes:
        state_feedback: erase with a learned share of beta per key head; false erases with beta, as in
            the delta rule.
        output_feedback: initial value of d; the query is q - d k. The authors use 1, or 0.02 in small
            models; 0 for no output feedback.
    """

    state_feedback: bool = True
    output_feedback: Number = 1.0


@register_mixer("comba", symbol="c")
class Comba(ScalarDecayDeltaRule):
    """Comba mixer (arXiv 2506.02475, section 3).

    S_t = alpha_t S_{t-1} - b beta_t k_t k_t^T S_{t-1} + beta_t k_t v_t^T,
    o_t = (q_t - d k_t)^T S_t / sqrt(K), with b = sigmoid(feedback) and d learned per key head.

    Unlike in gated DeltaNet, what is erased is read from the state before its decay. Decay,
    convolution and normalisation are those of gated DeltaNet; the output gate is a sigmoid. alpha_t
    is at least exp(-40).
    """

    Options = CombaOptions
    paper = "arXiv 2506.02475; negative eigenvalues arXiv 2411.12537"
    formula = "S_t = S_{t-1} (alpha_t I - b beta_t k_t k_t^T) + beta_t v_t k_t^T; reads q_t - d k_t"
    used_by = "Comba"
    gate_activation = "sigmoid"
    no_weight_decay = ("feedback", "correction")

    def __init__(self, options: CombaOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        self.build_decay()
        heads = self.key_heads
        self.feedback = nn.Parameter(torch.empty(heads)) if options.state_feedback else None
        self.correction = nn.Parameter(torch.empty(heads)) if options.output_feedback else None

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return grouped heads with unequal dims; neither feedback, and no convolution or gate."""
        return [
            {"num_heads": 4, "num_key_heads": 2, "head_dim": 6, "value_head_dim": 8},
            {"num_heads": 2, "conv_size": None, "negative_eigenvalues": True, "output_gate": False,
             "state_feedback": False, "output_feedback": 0.0},
        ]  # fmt: skip

    def init_parameters(self, std: float) -> None:
        """Set both feedbacks to their initial values; draw decays as in gated DeltaNet."""
        super().init_parameters(std)
        if self.feedback is not None:
            init.ones_(self.feedback)
        if self.correction is not None:
            init.constant_(self.correction, self.options.output_feedback)

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        q, k, v = self.project(x, cu_seqlens, cache)
        if self.correction is not None:
            q = (to_float32(q) - to_float32(self.correction)[:, None] * k).to(q.dtype)
        gates = self.gates(x)
        beta, log_decay = gates["beta"].unsqueeze(-1), gates["log_decay"].clamp(min=CLOSED)
        read = key = to_float32(k)
        if self.feedback is not None:
            read = torch.sigmoid(to_float32(self.feedback))[:, None] * key
        shared = self.num_heads // self.key_heads
        key, read = (y.repeat_interleave(shared, dim=2) for y in (key, read))
        erase: dict[str, Any] = {
            "erase_key": -beta * key,
            "erase_query": read * (-log_decay).exp().unsqueeze(-1),
        }
        v = (beta * to_float32(v)).to(v.dtype)
        o = self.recur(q, k, v, cu_seqlens, cache, log_decay=log_decay, **erase)
        return self.o_proj(self.read(o, x))
