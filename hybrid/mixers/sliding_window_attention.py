"""Sliding window attention: each token attends to the last W tokens (arXiv 2004.05150, 2310.06825)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybrid.config.declare import Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.local_attention import LocalAttention, LocalAttentionOptions
from hybrid.nn.local_rows import Reach


@dataclass(frozen=True)
class SlidingWindowAttentionOptions(LocalAttentionOptions):
    """Options of ``sliding_window_attention``, in addition to those of ``GroupedHeadOptions``.

    Attributes:
        window: W, tokens that a token attends to, including itself.
    """

    window: Size2 = 2048


@register_mixer("sliding_window_attention", symbol="W")
class SlidingWindowAttention(LocalAttention):
    """Sliding window softmax attention mixer (arXiv 2004.05150; Mistral, arXiv 2310.06825).

    o_t = sum_s softmax_s(scale * q_t . k_s) v_s over t - W < s <= t.
    """

    layer_type = "sliding_attention"
    Options = SlidingWindowAttentionOptions
    paper = "arXiv 2004.05150; Mistral arXiv 2310.06825"
    formula = "o_t = sum_s softmax_s(scale q_t . k_s) v_s, t - W < s <= t"
    used_by = "Mistral, Gemma 2 and 3, GPT-OSS, RecurrentGemma, Samba"

    def __init__(
        self, options: SlidingWindowAttentionOptions, sizes: Sizes, layer_idx: int
    ) -> None:
        super().__init__(options, sizes, layer_idx)
        self.build(options)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return grouped heads with QK-norm; biases and a gate, no positions; sinks and a cap; ALiBi."""
        return [
            {"window": 5, "num_heads": 4, "num_kv_heads": 2, "qk_norm": "head"},
            {"window": 16, "num_heads": 2, "rope_parameters": None, "bias": True,
             "output_bias": True, "output_gate": True},
            {"window": 3, "num_heads": 2, "sinks": True, "soft_cap": 2.0, "qk_norm": "layer",
             "qk_norm_type": "zero_centered_rmsnorm"},
            {"window": 6, "num_heads": 4, "num_kv_heads": 1, "rope_parameters": None,
             "alibi": True},
        ]  # fmt: skip

    @property
    def reach(self) -> Reach:
        """The last W tokens."""
        return Reach(self.options.window, chunked=False)

    def mixing_flops(self, context: int) -> float:
        """Count logits and weighted sum over the tokens of the window, fewer at the start."""
        width = self.reach.width
        short = min(context, width)
        return self.logits_flops((short * (short + 1) / 2 + (context - short) * width) / context)
