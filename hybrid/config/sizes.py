"""The record of sizes that a mixer or a feed-forward is built with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What a mixer or a feed-forward knows of the model around it.

    Attributes:
        hidden_size: D, channels of its input.
        num_hidden_layers: layers of the stack.
        norm_eps: epsilon of norms that have none of their own.
        max_position_embeddings: the longest sequence the model is meant for, or None.
        init: the initialisation scheme of the config.
        num_residual_branches: sublayers that add to the residual stream.
        mixing_idx, num_mixing_layers: the place of the layer among those that have a mixer.
        kind_idx: the place of the layer among those with a mixer of the same kind (`Mixer.kind`).
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
        """The gain of DeepNorm's initialisation (arXiv 2203.00555): (8 N)^(-1/4)."""
        return (4 * self.num_residual_branches) ** -0.25
