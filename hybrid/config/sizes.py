"""Sizes that a mixer or a feed-forward is built with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model that a mixer or a feed-forward is built for.

    Attributes:
        hidden_size: D, the number of input channels.
        num_hidden_layers: number of layers of the stack.
        norm_eps: default epsilon of norms.
        max_position_embeddings: maximum sequence length of the model, or None.
        init: initialisation scheme of the config.
        num_residual_branches: number of sublayers that add to the residual stream.
        mixing_idx, num_mixing_layers: index and count of the layers with a mixer.
        kind_idx: index of the layer among those with a mixer of the same kind (``Mixer.kind``).
    """

    hidden_size: int
    num_hidden_layers: int = 1
    norm_eps: float = 1e-6
    max_position_embeddings: int | None = None
    init: str = "depth_scaled"
    num_residual_branches: int = 1
    mixing_idx: int = 0
    num_mixing_layers: int = 1
    kind_idx: int = 0

    @property
    def deepnorm_beta(self) -> float:
        """Gain of DeepNorm's initialisation (arXiv 2203.00555): (8 N)^(-1/4)."""
        return (4 * self.num_residual_branches) ** -0.25
