"""What ``bench.py`` compares: for each op, our call and the fallback in transformers, if any.

One decoded token is in ``baseline_steps.py``.

Functions of transformers are imported when they are called: the package itself does not need it.
They are unwrapped, since where an optional kernel package is installed transformers puts its
function in the place of the fallback, GPU or not.

Shapes: B = 1 batch, T time, H heads, K key dim, V value dim, D channels, N state size, C chunk.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_kernels.api import causal_conv1d, linear_attention, selective_scan
from hybrid_kernels.fused_qkv_grad import split

H, K, V, D, N = 4, 64, 64, 256, 16
CONV_CHANNELS = 768

# Inputs whose gradient neither side gives.
CONSTANTS = ("log_slopes",)


@dataclass(frozen=True)
class Pair:
    """Two ways to compute one thing.

    Attributes:
        inputs: from T to the arguments of both.
        ours: returns the output.
        theirs: returns the same.
        flops: from T to the multiply-adds x 2 of our forward products, 0 where there are none.
        backward_flops: how many times that forward and backward need.
        backward: whether there is a backward pass to time.
    """

    inputs: Callable[[int], dict[str, Tensor]]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    flops: Callable[[int], float] = lambda length: 0.0
    backward_flops: float = 1.0
    backward: bool = True


def _additive_flops(length: int) -> float:
    chunk = 64
    return 2.0 * length * H * (chunk * K + chunk * V + 2 * K * V)


def _delta_flops(length: int) -> float:
    chunk = 32
    pairs, inverse = 2 * chunk * K, chunk * chunk / 3
    return 2.0 * length * H * (pairs + inverse + chunk * (K + V) + chunk * V + 3 * K * V)


def rows(
    length: int, decay: tuple[int, ...] | None = None, delta: bool = False
) -> dict[str, Tensor]:
    """Draw q, k and v, with beta for the delta rule, with mild log decays of a shape per token."""
    found = {name: torch.randn(1, length, H, K) for name in ("q", "k", "v")}
    if delta:
        found["k"] = F.normalize(found["k"], dim=-1)
        found["beta"] = torch.rand(1, length, H)
    if decay is not None:
        found["log_decay"] = -0.1 * torch.rand(1, length, *decay)
    return found


# Mamba-2, one group of B and C for all heads, the step sizes and A of its initialisation.


def ssd_inputs(length: int) -> dict[str, Tensor]:
    """Draw the arguments of Mamba-2's scan."""
    return {
        "x": torch.randn(1, length, H, V),
        "dt": torch.empty(1, length, H).uniform_(1e-3, 0.1),
        "A": -torch.arange(1.0, H + 1),
        "B": torch.randn(1, length, 1, K),
        "C": torch.randn(1, length, 1, K),
    }


def _ssd_ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return linear_attention(C, B, x, log_decay=dt * A, write_scale=dt, scale=1.0)[0]


def _ssd_theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    found = inspect.unwrap(mamba2_chunk_scan)(x, dt, A, B, C, chunk_size=256)
    return found[0] if isinstance(found, tuple) else found


# Gated DeltaNet (Qwen3-Next) and Kimi Delta Attention.


def _delta_ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    return linear_attention(q, k, v, beta=beta, log_decay=log_decay)[0]


def _gated_delta_theirs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return inspect.unwrap(torch_chunk_gated_delta_rule)(q, k, v, log_decay, beta)[0]


def _kda_theirs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    return inspect.unwrap(chunk_kimi_delta_attention)(q, k, v, log_decay, beta)[0]


# Erase keys apart from writing: no fallback in transformers. Set against our own delta rule with a
# decay over keys, of which it is a generalisation, on the same transition.


def _erase_ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    strength = beta.unsqueeze(-1)
    a = -strength * k
    return linear_attention(q, k, strength * v, log_decay=log_decay, erase_key=a, erase_query=k)[0]


def _erase_flops(length: int) -> float:
    chunk = 32
    pairs, inverse = 4 * chunk * K, chunk * chunk / 3
    products = pairs + inverse + chunk * K + 4 * chunk * V + 4 * K * V
    return 2.0 * length * H * products


# Lightning: MiniMax's layer with everything around the recurrence made the identity.


class _Half(torch.nn.Module):
    """Stand in for the output gate: its sigmoid is one half everywhere."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(1)


@lru_cache
def lightning_layer() -> torch.nn.Module:
    """Return MiniMax's layer, reduced to its recurrence times a half."""
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=H * K,
        head_dim=K,
        num_attention_heads=H,
        num_hidden_layers=8,
        layer_types=["linear_attention"] * 8,
    )
    layer = MiniMaxLightningAttention(config, layer_idx=0)
    for name in ("qkv_proj", "act_fn", "norm", "out_proj"):
        setattr(layer, name, torch.nn.Identity())
    layer.output_gate = _Half()
    return layer


def lightning_inputs(length: int) -> dict[str, Tensor]:
    """Draw MiniMax's joint queries, keys and values, and its decays."""
    slopes = -lightning_layer().get_buffer("slope_rate").flatten().float()
    return {"qkv": torch.randn(1, length, H * 3 * K), "log_slopes": slopes}


def lightning_ours(qkv: Tensor, log_slopes: Tensor, state: Tensor | None = None) -> Tensor:
    """Compute what ``lightning_layer`` does, after a state if there is one: it is overwritten."""
    q, k, v = split(qkv.view(1, -1, H, 3 * K), [K] * 3)
    return linear_attention(
        q,
        k,
        v,
        log_decay=log_slopes,
        scale=0.5,
        initial_state=state,
        output_final_state=state is not None,
        overwrite_state=state is not None,
    )[0].flatten(2)


def _lightning_theirs(qkv: Tensor, log_slopes: Tensor) -> Tensor:
    return lightning_layer()(qkv, None, None)[0]


# GLA: the plain exact form, every exponent a difference within a chunk of 16.


def _gla_ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return linear_attention(q, k, v, log_decay=log_decay)[0]


def _gla_theirs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    chunk = 16
    q, k, v, g = (x.unflatten(1, (-1, chunk)).transpose(2, 3) for x in (q, k, v, log_decay))
    total = g.cumsum(3)
    mask = torch.ones(chunk, chunk, dtype=torch.bool).tril()[..., None]
    decays = (total[..., :, None, :] - total[..., None, :, :]).masked_fill(~mask, -torch.inf).exp()
    scores = torch.einsum("bchik,bchjk,bchijk->bchij", q, k, decays) * K**-0.5
    o = scores @ v
    writes = (k * (total[..., -1:, :] - total).exp()).mT @ v
    state, states = torch.zeros_like(writes[:, 0]), []
    for i in range(writes.shape[1]):
        states.append(state)
        state = state * total[:, i, :, -1, :, None].exp() + writes[:, i]
    o = o + (q * total.exp() * K**-0.5) @ torch.stack(states, 1)
    return o.transpose(2, 3).flatten(1, 2)


# Mamba-1.


def scan_inputs(length: int) -> dict[str, Tensor]:
    """Draw the arguments of ``selective_scan``."""
    return {
        "u": torch.randn(1, length, D),
        "delta": torch.empty(1, length, D).uniform_(1e-3, 0.1),
        "A": -torch.arange(1.0, N + 1).expand(D, N).contiguous(),
        "B": torch.randn(1, length, N),
        "C": torch.randn(1, length, N),
        "D": torch.randn(D),
    }


def _scan_ours(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return selective_scan(u, delta, A, B, C, D)[0]


def _scan_theirs(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    found = inspect.unwrap(mamba_selective_scan)(u.mT, delta.mT, A, B.mT, C.mT, D)
    return (found[0] if isinstance(found, tuple) else found).mT


# Short convolution.


def _conv_inputs(length: int) -> dict[str, Tensor]:
    return {
        "x": torch.randn(1, length, CONV_CHANNELS),
        "weight": torch.randn(CONV_CHANNELS, 4),
        "bias": torch.randn(CONV_CHANNELS),
    }


def _conv_ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu")[0]


def _conv_theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_fn

    return inspect.unwrap(causal_conv1d_fn)(x.mT, weight, bias, activation="silu").mT


PAIRS: dict[str, Pair] = {
    "ssd": Pair(ssd_inputs, _ssd_ours, _ssd_theirs, _additive_flops, 3.5),
    "gated_delta": Pair(
        lambda t: rows(t, (H,), True), _delta_ours, _gated_delta_theirs, _delta_flops, 3.5
    ),
    "lightning": Pair(lightning_inputs, lightning_ours, _lightning_theirs, _additive_flops, 3.5),
    "kda": Pair(lambda t: rows(t, (H, K), True), _delta_ours, _kda_theirs, _delta_flops, 3.5),
    "erase": Pair(lambda t: rows(t, (H, K), True), _erase_ours, _delta_ours, _erase_flops, 3.5),
    "gla": Pair(lambda t: rows(t, (H, K)), _gla_ours, _gla_theirs, _additive_flops, 3.5),
    "mamba1": Pair(scan_inputs, _scan_ours, _scan_theirs),
    "conv1d": Pair(_conv_inputs, _conv_ours, _conv_theirs),
}
