"""Chunked attention: each token attends to its own chunk of W tokens (local layers of Llama 4).

Llama 4 alternates three such layers, with rotary positions, and one full layer without positions.
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
    """Options of ``chunked_attention``, in addition to those of ``GroupedHeadOptions``.

    Attributes:
        chunk_size: W, tokens per chunk, counted from the start of each document.
    """

    chunk_size: Size2 = 8192


@register_mixer("chunked_attention", symbol="B")
class ChunkedAttention(LocalAttention):
    """Chunked softmax attention mixer (Llama 4; block-wise attention of arXiv 2004.05150, section 3).

    o_t = sum_s softmax_s(scale * q_t . k_s) v_s over W floor(t / W) <= s <= t.
    """

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
        """Return the options of Llama 4; and no positions with biases, a gate and sinks."""
        return [
            {"chunk_size": 5, "num_heads": 4, "num_kv_heads": 2, "qk_norm": "head",
             "qk_norm_type": "weightless_rmsnorm"},
            {"chunk_size": 8, "num_heads": 2, "rope_parameters": None, "bias": True,
             "output_bias": True, "output_gate": True, "sinks": True},
        ]  # fmt: skip

    @property
    def reach(self) -> Reach:
        """The tokens since the start of the chunk."""
        return Reach(self.options.chunk_size, chunked=True)

    def mixing_flops(self, context: int) -> float:
        """Count logits and weighted sum over the earlier tokens of the chunk."""
        width = self.reach.width
        whole, rest = divmod(context, width)
        pairs = whole * width * (width + 1) / 2 + rest * (rest + 1) / 2
        return self.logits_flops(pairs / context)
