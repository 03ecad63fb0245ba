"""Chunked attention: each token attends to its own chunk of W tokens (Llama 4's local layers).

Llama 4 has three such layers, with rotary positions, to one full layer without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybrid.config.declare import Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.local_attention import LocalAttention, LocalAttentionOptions
from hybrid.nn.local_rows import Reach


@dataclass(frozen=True)
class ChunkedAttentionOptions(LocalAttentionOptions):
    """Options of `chunked_attention`: those of `GroupedHeadOptions`, and:

    Attributes:
        chunk_size: W, tokens of a chunk, counted from the start of each document.
    """

    chunk_size: Size2 = 8192


@register_mixer("chunked_attention", symbol="B")
class ChunkedAttention(LocalAttention):
    """o_t = sum_s softmax_s(scale * q_t . k_s) v_s over W floor(t / W) <= s <= t."""

    layer_type = "chunked_attention"
    Options = ChunkedAttentionOptions
    paper = "Llama 4; block-wise attention of arXiv 2004.05150, section 3"
    formula = "o_t = sum_s softmax_s(scale q_t . k_s) v_s, W floor(t / W) <= s <= t"
    used_by = "Llama 4"

    def __init__(self, options: ChunkedAttentionOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        self.build(options)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """As Llama 4; no positions, biases, a gate, sinks."""
        return [
            {"chunk_size": 5, "num_heads": 4, "num_kv_heads": 2, "qk_norm": "head",
             "qk_norm_type": "weightless_rmsnorm"},
            {"chunk_size": 8, "num_heads": 2, "rope_parameters": None, "bias": True,
             "output_bias": True, "output_gate": True, "sinks": True},
        ]  # fmt: skip

    @property
    def reach(self) -> Reach:
        """Back to the start of the chunk."""
        return Reach(self.options.chunk_size, chunked=True)

    def mixing_flops(self, context: int) -> float:
        """Logits and weighted sum over the tokens of the chunk up to each."""
        width = self.reach.width
        whole, rest = divmod(context, width)
        pairs = whole * width * (width + 1) / 2 + rest * (rest + 1) / 2
        return self.logits_flops(pairs / context)
