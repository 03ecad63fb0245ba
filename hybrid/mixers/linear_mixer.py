"""Base class of all parameterisations of ``hybrid_kernels.linear_attention``.

Shapes: B batch, T time, H heads, K key dim, V value dim, D model dim.

``LinearMixer`` projects x (B, T, D) to (q, k, v, decay, beta), calls the op, and projects the output. A
new linear mixer overrides one or two methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.mixers.base import StateMixer
from hybrid.mixers.short_convolution import ShortConvolution
from hybrid.nn.norms import build_norm
from hybrid.nn.past import Slot, StateSpec
from hybrid_kernels import linear_attention


class LinearMixer(StateMixer):
    """Base class of parameterisations of ``linear_attention``.

    Subclasses set the sizes with ``build`` and override ``gates`` (decay, beta) and ``read`` (the
    output). If q, k, v and the gates depend on each other, override ``mix``.
    """

    scale: float = 1.0

    def build(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        conv_size: int | None,
        bias: bool = False,
        *,
        key_heads: int | None = None,
        conv_bias: bool = False,
        conv_activation: str | None = None,
        writes: int = 1,
    ) -> None:
        """Create the projections of q, k (H_k x K) and v (H x V), the convolution, and the output.

        Args:
            num_heads: H, heads of v and of the state.
            key_dim: K.
            value_dim: V.
            conv_size: W, width of a short convolution on q, k, v; None for no convolution.
            bias: add biases to the projections.
            key_heads: H_k, heads of q and k, each shared by H / H_k heads of v; default H.
            conv_bias: add a bias to the convolution.
            conv_activation: ``silu`` or None, after the convolution.
            writes: keys and values per token. Those of one write follow those of the write before: k has
                writes x H_k x K channels, v writes x H x V. Subclasses use them in ``mix``.
        """
        d_model = self.sizes.hidden_size
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.key_heads = num_heads if key_heads is None else key_heads
        inner_key, inner = self.key_heads * key_dim, num_heads * value_dim
        self.q_proj = nn.Linear(d_model, inner_key, bias=bias)
        self.k_proj = nn.Linear(d_model, writes * inner_key, bias=bias)
        self.v_proj = nn.Linear(d_model, writes * inner, bias=bias)
        self.o_proj = nn.Linear(inner, d_model, bias=bias)
        self.conv = None
        if conv_size:
            channels = inner_key + writes * (inner_key + inner)
            self.conv = ShortConvolution(channels, conv_size, conv_bias, conv_activation)

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Project x, run the recurrence, and project the output."""
        q, k, v = self.project(x, cu_seqlens, cache)
        o = self.recur(q, k, v, cu_seqlens, cache, **self.gates(x))
        return self.o_proj(self.read(o, x))

    def recur(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        cache: Slot | None,
        carry: Callable[[torch.Tensor], torch.Tensor] | None = None,
        state: str = "recurrent",
        **gates: Any,
    ) -> torch.Tensor:
        """Call the op, and continue from and write to the cache slot if there is one: o (B, T, H, V).

        Values that are too wide for the op are split into parts, each with its own state. The result is
        the same, because the columns of a state do not interact. ``carry`` maps the final state
        (N, H, K, V) to the state that is stored, under the name ``state``.
        """
        parts = value_parts(v.shape[-1])
        before = None if cache is None else cache.state(state)
        if parts > 1:
            v, gates = _split_values(v, gates, parts)
            before = None if before is None else _split_state(before, parts)
        o, after = linear_attention(
            q,
            k,
            v,
            **gates,
            scale=self.scale,
            initial_state=before,
            cu_seqlens=cu_seqlens,
            output_final_state=cache is not None,
            overwrite_state=before is not None and not torch.is_grad_enabled(),
        )
        if cache is not None and after is not None:
            after = after if parts == 1 else _join_state(after, parts)
            cache.set_state(state, after if carry is None else carry(after))
        return o if parts == 1 else o.unflatten(2, (-1, parts)).flatten(-2)

    def project(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project x (B, T, D) to q, k (B, T, H_k, K), v (B, T, H, V); convolve; apply ``features``.

        With several writes per token, k and v have ``writes`` times as many heads.
        """
        q, k, v = self.read_in(x)
        if self.conv is not None:
            q, k, v = self.conv.split([q, k, v], cu_seqlens, cache)
        q, k = (y.unflatten(-1, (-1, self.key_dim)) for y in (q, k))
        return self.features(q, k, v.unflatten(-1, (-1, self.value_dim)))

    def read_in(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project x (B, T, D) to the convolution's input: q, k (B, T, H_k * K), v (B, T, H * V)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def features(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Apply activations or normalisation to q, k, v; identity by default."""
        return q, k, v

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return the op's ``log_decay`` and ``beta`` for x (B, T, D); none by default."""
        return {}

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Map o (B, T, H, V) to (B, T, H * V); subclasses normalise and gate."""
        return o.flatten(-2)

    def mixing_flops(self, context: int) -> float:
        """Count decay, write and read of a K x V state per head: 1 + 2 + 2 FLOPs per element."""
        return 5.0 * self.num_heads * self.key_dim * self.value_dim

    def states(self) -> dict[str, StateSpec]:
        """Return one K x V state per head, and the last W - 1 inputs of the convolution."""
        conv = self.conv.states() if self.conv is not None else {}
        shape = (self.num_heads, self.key_dim, self.value_dim)
        return {"recurrent": StateSpec(shape, torch.float32), **conv}


MAX_HEAD_DIM = 256


def value_parts(value_dim: int) -> int:
    """Return the number of parts to split values into, so that the op supports the width of each."""
    return -(-value_dim // MAX_HEAD_DIM)


def _split_values(
    v: torch.Tensor, gates: dict[str, Any], parts: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Split v (B, T, H, V) into (B, T, H * parts, V / parts), and repeat each head's gates."""
    heads_dim = {"log_decay": 2, "beta": 2, "write_scale": 2, "bonus": 0}
    heads_dim |= {"erase_key": 2, "erase_query": 2}
    split = dict(gates)
    for name, dim in heads_dim.items():
        gate = gates.get(name)
        if gate is not None:
            split[name] = gate.repeat_interleave(parts, dim=0 if gate.ndim == 1 else dim)
    if gates.get("value_log_decay") is not None:
        split["value_log_decay"] = gates["value_log_decay"].unflatten(-1, (parts, -1)).flatten(2, 3)
    return v.unflatten(-1, (parts, -1)).flatten(2, 3), split


def _split_state(state: torch.Tensor, parts: int) -> torch.Tensor:
    """Split states (N, H, K, V) into (N, H * parts, K, V / parts)."""
    return state.unflatten(-1, (parts, -1)).transpose(2, 3).flatten(1, 2)


def _join_state(state: torch.Tensor, parts: int) -> torch.Tensor:
    """Invert ``_split_state``."""
    return state.unflatten(1, (-1, parts)).transpose(2, 3).flatten(-2)


class OutputNorm(nn.Module):
    """RMSNorm of o (B, T, H, V), over all heads together (``layer``) or over each head (``head``).

    MiniMax-01 uses ``layer``. Ring-linear and RetNet use ``head``.
    """

    def __init__(self, kind: str, num_heads: int, value_dim: int, eps: float) -> None:
        super().__init__()
        self.per_head = kind == "head"
        self.norm = build_norm(
            "rmsnorm", value_dim if self.per_head else num_heads * value_dim, eps
        )

    def forward(self, o: torch.Tensor) -> torch.Tensor:
        """Normalise (B, T, H, V) and flatten to (B, T, H * V)."""
        return self.norm(o).flatten(-2) if self.per_head else self.norm(o.flatten(-2))


FEATURE_MAPS = {
    "identity": lambda x: x,
    "silu": F.silu,
    "relu": F.relu,
    "elu+1": lambda x: F.elu(x) + 1,
}
