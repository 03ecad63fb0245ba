"""The longest request that vLLM plans for."""
# pyright: reportMissingImports=false

from __future__ import annotations

import math

from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from hybrid.config.hybrid_config import HybridConfig


class HybridSizes(ModelArchConfigConvertorBase):
    """Sizes of a ``HybridConfig`` for vLLM."""

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        """Return ``max_position_embeddings``; infinity if it is null.

        vLLM then assumes 2048 tokens, with a warning, or takes ``--max-model-len``. It reserves memory
        for the longest request, so ``HybridConfig.n_positions`` (2^31 - 1) does not fit.
        """
        length = self.hf_config.max_position_embeddings
        if length is None:
            return math.inf, None
        return length, "max_position_embeddings"


def register_lengths() -> None:
    """Register ``HybridSizes`` for hybrid models."""
    MODEL_ARCH_CONFIG_CONVERTORS[HybridConfig.model_type] = HybridSizes
