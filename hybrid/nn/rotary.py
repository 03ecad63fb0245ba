"""Rotary position embeddings (arXiv 2104.09864) with the frequencies of transformers' RoPE functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from hybrid.config.options import did_you_mean
from hybrid.config.sizes import Sizes
from hybrid.nn.precision import Float32Buffers

# RoPE types that extend a training length, and therefore need it.
NEEDS_LENGTH = ("dynamic", "yarn", "longrope", "llama3")

# RoPE types whose frequencies depend on the sequence length.
BY_LENGTH = ("dynamic", "longrope")


# Keys of all types, required keys of each type, and optional keys.
COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
REQUIRED = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "proportional": set(),
    "yarn": {"factor"},
    "longrope": {"short_factor", "long_factor"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    },
}  # fmt: skip
OPTIONAL = {
    "dynamic": {"original_max_position_embeddings"},
    "proportional": {"factor"},
    "yarn": {
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
    "longrope": {"original_max_position_embeddings", "attention_factor", "factor"},
}  # fmt: skip
LISTS = ("short_factor", "long_factor")


class RotaryEmbedding(Float32Buffers, LlamaRotaryEmbedding):
    """Rotary position embedding: cos and sin (B, T, R) of position ids.

    Args:
        rope_parameters: RoPE dictionary of transformers.
        head_dim: dims of a head. The first R = partial_rotary_factor * head_dim are rotated.
        max_position_embeddings: training length in tokens, for RoPE types that extend it; default 2048.
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
        """Return the frequencies theta ** (-2i / R) for i < R / 2, and a scale of 1."""
        rope: Any = config.rope_parameters
        dim = rotated_dims(rope, config.hidden_size)
        exponents = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
        return 1.0 / (rope["rope_theta"] ** exponents), 1.0


class ExactRotaryEmbedding(RotaryEmbedding):
    """``RotaryEmbedding`` with angles in float64, which are exact at any position."""

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin (B, T, R) in the dtype of x (B, T, D), at position_ids (B, T)."""
        angle = (position_ids[..., None].double() * self.inv_freq.double()).repeat(1, 1, 2)
        scale = self.attention_scaling
        return (angle.cos() * scale).to(x.dtype), (angle.sin() * scale).to(x.dtype)


def build_rotary(
    rope_parameters: dict[str, Any] | None,
    head_dim: int,
    sizes: Sizes,
    cls: type[RotaryEmbedding] = RotaryEmbedding,
) -> RotaryEmbedding | None:
    """Return the rotary embedding of a RoPE dictionary; None without positions."""
    if rope_parameters is None:
        return None
    return cls(rope_parameters, head_dim, sizes.max_position_embeddings)


def rotated_dims(rope_parameters: dict[str, Any], head_dim: int) -> int:
    """Return R, the number of rotated dims of a head."""
    return int(head_dim * rope_parameters.get("partial_rotary_factor", 1.0))


def yarn_mscale(rope_parameters: dict[str, Any] | None) -> float:
    """Return DeepSeek's YaRN scale of q and k, 0.1 m ln(factor) + 1 with m = ``mscale_all_dim``.

    It is 1 without YaRN or without ``mscale_all_dim``.
    """
    rope = rope_parameters or {}
    weight = rope.get("mscale_all_dim")
    if rope.get("rope_type") != "yarn" or not weight or rope["factor"] <= 1:
        return 1.0
    return 0.1 * weight * math.log(rope["factor"]) + 1.0


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dims of x (B, H, T, K) by cos and sin (B, T, R), which have no gradients.

    If x requires a gradient, the order of operations differs, and the result may differ by rounding.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Rotation.apply(x, cos, *sin.chunk(2, dim=-1), 1)
    dim = cos.shape[-1]
    head, tail = x[..., :dim], x[..., dim:]
    head = head * cos + rotate_half(head) * sin
    return torch.cat([head, tail], dim=-1) if tail.shape[-1] else head


class _Rotation(torch.autograd.Function):
    """Rotation y = [a cos - b sin, b cos + a sin, tail] of x = [a, b, tail], in three passes over x.

    The two halves of the rotated dims have separate sines, ``lower`` and ``upper``. The gradient is the
    inverse rotation (``sign``) with the two sines swapped. x is not saved for backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, cos: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, sign: int
    ) -> torch.Tensor:
        half = lower.shape[-1]
        a, b, tail = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        y = x[..., : 2 * half] * cos
        y[..., :half].addcmul_(b, lower, value=-sign)
        y[..., half:].addcmul_(a, upper, value=sign)
        return torch.cat([y, tail], dim=-1) if tail.shape[-1] else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, *angles, ctx.sign = inputs
        ctx.save_for_backward(*angles)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, lower, upper = ctx.saved_tensors
        return _Rotation.apply(grads[0], cos, upper, lower, -ctx.sign), None, None, None, None


def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first R dims of q and k (B, H, T, K) by cos and sin (B, T, R)."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rope_problems(rope: dict[str, Any], head_dim: int, sizes: Sizes) -> list[str]:
    """Return an error line for each mistake in a RoPE dictionary."""
    kinds = [kind for kind in REQUIRED if kind == "default" or kind in ROPE_INIT_FUNCTIONS]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in kinds:
        return [f"rope_parameters.rope_type: unknown {kind!r}, {did_you_mean(str(kind), kinds)}"]
    lines = _key_problems(rope, kind, head_dim)
    theta, share = rope.get("rope_theta", 10000.0), rope.get("partial_rotary_factor", 1.0)
    if not _is_positive(theta):
        lines.append(f"rope_parameters.rope_theta: expected a positive number, got {theta!r}")
    if not _is_share(rope):
        lines.append(
            f"rope_parameters.partial_rotary_factor: expected a number in (0, 1], got {share!r}"
        )
    elif rotated_dims(rope, head_dim) % 2 or not rotated_dims(rope, head_dim):
        lines.append(
            "rope_parameters.partial_rotary_factor: expected an even number of rotated dims, at least 2,"
            f" got {rotated_dims(rope, head_dim)} of head_dim {head_dim}"
        )
    if kind in NEEDS_LENGTH and sizes.max_position_embeddings is None:
        lines.append(
            f"rope_parameters.rope_type: expected max_position_embeddings to be set for {kind!r}, got"
            " null; try setting max_position_embeddings"
        )
    return lines


def _key_problems(rope: dict[str, Any], kind: str, head_dim: int) -> list[str]:
    """Return an error line for each RoPE key that is unknown, missing or not a number."""
    known = COMMON | REQUIRED[kind] | OPTIONAL.get(kind, set())
    lines = [
        f"rope_parameters.{key}: unknown key for rope_type {kind!r}, {did_you_mean(str(key), known)}"
        for key in rope
        if key not in known
    ]
    for key in sorted(REQUIRED[kind] - set(rope)):
        lines.append(
            f"rope_parameters.{key}: expected a value, as rope_type {kind!r} requires it, got none"
        )
    for key, value in rope.items():
        where = f"rope_parameters.{key}"
        if key in LISTS and key in known:
            half = rotated_dims(rope, head_dim) // 2 if _is_share(rope) else None
            if not isinstance(value, list) or (half is not None and len(value) != half):
                lines.append(f"{where}: expected a list of {half} numbers, got {value!r}")
        elif "factor" in key and key in known - COMMON and not _is_positive(value):
            lines.append(f"{where}: expected a positive number, got {value!r}")
    return lines


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _is_share(rope: dict[str, Any]) -> bool:
    share = rope.get("partial_rotary_factor", 1.0)
    return isinstance(share, (int, float)) and 0 < share <= 1
