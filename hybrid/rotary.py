"""Rotary position embeddings (arXiv 2104.09864), frequencies by transformers' own rope functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from hybrid.options import did_you_mean
from hybrid.precision import Float32Buffers

if TYPE_CHECKING:
    from hybrid.config import HybridConfig

# These types stretch a known training length, so they have to be told what it is.
NEEDS_LENGTH = ("dynamic", "yarn", "longrope", "llama3")


class RotaryEmbedding(Float32Buffers, LlamaRotaryEmbedding):
    """cos and sin (B, T, R) of R = partial_rotary_factor * head_dim rotated dims, from position ids.

    Args:
        rope_parameters: transformers' rope dictionary.
        head_dim: dims of a head, of which the first R are rotated.
        max_position_embeddings: the training length, for the rope types that stretch it.
    """

    float32_buffers = ("inv_freq", "original_inv_freq")

    def __init__(
        self, rope_parameters: dict[str, Any], head_dim: int, max_position_embeddings: int | None
    ) -> None:
        length = max_position_embeddings or 2048
        super().__init__(
            LlamaConfig(
                hidden_size=head_dim,
                num_attention_heads=1,
                head_dim=head_dim,
                max_position_embeddings=length,
                rope_parameters={"rope_theta": 10000.0, **rope_parameters},
            )
        )

    @staticmethod
    def compute_default_rope_parameters(
        config: LlamaConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """theta ** (-2i / R) for i < R / 2, and a scale of 1."""
        rope = config.rope_parameters
        dim = rotated_dims(rope, config.head_dim)
        exponents = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
        return 1.0 / (rope["rope_theta"] ** exponents), 1.0


def rotated_dims(rope_parameters: dict[str, Any], head_dim: int) -> int:
    """R, the number of dims of a head that are rotated."""
    return int(head_dim * rope_parameters.get("partial_rotary_factor", 1.0))


def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first R dims of q and k (B, H, T, K) by cos and sin (B, T, R)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    dim = cos.shape[-1]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        head, tail = x[..., :dim], x[..., dim:]
        head = head * cos + rotate_half(head) * sin
        return torch.cat([head, tail], dim=-1) if tail.shape[-1] else head

    return rotate(q), rotate(k)


def rope_problems(rope: dict[str, Any], head_dim: int, config: HybridConfig) -> list[str]:
    """What is wrong with a rope dictionary, a line each."""
    kinds = ["default", *ROPE_INIT_FUNCTIONS]
    kind = rope.get("rope_type", "default")
    if kind not in kinds:
        return [f"rope_parameters.rope_type: unknown {kind!r}, {did_you_mean(str(kind), kinds)}"]
    lines = []
    theta, share = rope.get("rope_theta", 10000.0), rope.get("partial_rotary_factor", 1.0)
    if not isinstance(theta, (int, float)) or theta <= 0:
        lines.append(f"rope_parameters.rope_theta: must be a positive number, found {theta!r}")
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        lines.append(f"rope_parameters.partial_rotary_factor: must be in (0, 1], found {share!r}")
    elif rotated_dims(rope, head_dim) % 2 or not rotated_dims(rope, head_dim):
        lines.append(
            f"rope_parameters: {rotated_dims(rope, head_dim)} of head_dim {head_dim} would be rotated;"
            " rotary positions need an even number, at least 2"
        )
    if kind in NEEDS_LENGTH and config.max_position_embeddings is None:
        lines.append(f"rope_parameters.rope_type: {kind!r} needs max_position_embeddings to be set")
    return lines
