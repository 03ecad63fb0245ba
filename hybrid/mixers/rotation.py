"""Complex decays as rotations: S_t = exp(g_t + i phi_t) S_{t-1} + k_t v_t^T with real tensors.

A complex channel is a pair of real channels. Let Phi_t be the sum of angles up to t. Rotating q_t and
k_t by Phi_t gives a recurrence with the real decay exp(g_t), because the product of a rotated q_t and a
rotated k_s depends only on Phi_t - Phi_s. Sums start from 0 in every forward pass. The final state is
rotated back by the last sum. It is thus always relative to the last token, and the cache does not need
a position.

Shapes: B batch, T time, N documents, H heads, K channels, J = K / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def rope_angles(rope_theta: float | None, rotated: int) -> torch.Tensor:
    """Return the angles per step of the pairs of ``rotated`` channels, (J,) float32.

    The angles are those of rotary embeddings (arXiv 2104.09864, eq. 15): rope_theta^(-2 j / rotated).
    The result is empty if ``rope_theta`` is None.
    """
    if rope_theta is None or not rotated:
        return torch.empty(0, dtype=torch.float32)
    return rope_theta ** -(torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x_j, x_{j+J}) of x (..., K) by angle (..., J); keep channels from 2J on."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    pairs = cos.shape[-1]
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def rotate_state(state: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotate the rows of states (N, H, K, V) by angle (N, H, J), as ``rotate`` does."""
    return rotate(state.transpose(-1, -2), angle.unsqueeze(-2)).transpose(-1, -2)


def positioned(
    q: torch.Tensor, k: torch.Tensor, theta: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Rotate q and k (B, T, H, K) by theta (J,) per step.

    Returns:
        q and k rotated, and a function that rotates the final state back, relative to the last token.
    """
    steps = theta.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    angle, last = running_angle(steps.expand(*q.shape[:2], 1, -1), cu_seqlens)
    return rotate(q, angle), rotate(k, angle), lambda state: rotate_state(state, -last)


def running_angle(
    angle: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cumulative sums of angles within each document, in radians.

    Sums are computed in float64: float32 keeps only three decimals of an angle of 1e5.

    Args:
        angle: (B, T, ...), radians per token.
        cu_seqlens: (N + 1,) document boundaries, or None for one document per row.

    Returns:
        The sums up to each token (B, T, ...), in (-2 pi, 2 pi), and those of whole documents (N, ...).
        Both are float32, or float64 if ``angle`` is.
    """
    dtype = torch.float64 if angle.dtype == torch.float64 else torch.float32
    total = angle.double().cumsum(dim=1)
    if cu_seqlens is None:
        last = total[:, -1] if total.shape[1] else total.sum(dim=1)
        return _wrap(total, dtype), _wrap(last, dtype)
    bounds = cu_seqlens.long()
    from_zero = torch.cat([torch.zeros_like(total[:, :1]), total], dim=1)[0]
    before = from_zero[bounds[:-1]]
    token = torch.arange(total.shape[1], device=angle.device)
    document = torch.searchsorted(bounds, token, right=True) - 1
    return _wrap(total - before[document], dtype), _wrap(from_zero[bounds[1:]] - before, dtype)


def _wrap(angle: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.fmod(angle, 2 * torch.pi).to(dtype)
