"""Token embeddings with a multiplier.

Shapes: B batch, T time, D model dim, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from hybrid.config.fields import StackFields


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times a multiplier.

    With ``rounded``, the multiplier is first rounded to the dtype of the weights. Gemma rounds (arXiv
    2403.08295): in bfloat16, sqrt(3072) is 55.5. Granite and Falcon-H1 do not round.
    """

    def __init__(
        self, vocab_size: int, dim: int, padding_idx: int | None, multiplier: float, rounded: bool
    ) -> None:
        super().__init__(vocab_size, dim, padding_idx)
        self.multiplier, self.rounded = multiplier, rounded

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ids (B, T) to embeddings (B, T, D)."""
        x = super().forward(input)
        if not self.rounded:
            return x * self.multiplier
        return x * torch.tensor(self.multiplier, dtype=x.dtype, device=x.device)


def build_embedding(config: StackFields) -> nn.Embedding:
    """Return the embedding module, which maps ids (B, T) to (B, T, D)."""
    sizes = config.vocab_size, config.hidden_size, config.pad_token_id
    multiplier = config.embedding_multiplier
    if isinstance(multiplier, str):
        return ScaledEmbedding(*sizes, config.hidden_size**0.5, rounded=True)
    if multiplier == 1:
        return nn.Embedding(*sizes)
    return ScaledEmbedding(*sizes, multiplier, rounded=False)
