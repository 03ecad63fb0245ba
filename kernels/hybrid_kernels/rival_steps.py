"""What ``bench.py`` compares for one decoded token: each form's step, and somebody else's.

Where transformers has a step for machines without a GPU, that; where it has none, the definition in
``reference.py``, one step of which is the formula written out. Both sides take a state and give the
next one; those of transformers update theirs in place.

Legend: B = 1 batch, H heads, K key dim, V value dim, D channels, N state size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.api import causal_conv1d, linear_attention, selective_scan
from hybrid_kernels.rivals import (
    CONV_CHANNELS,
    D,
    H,
    K,
    N,
    Pair,
    V,
    lightning_inputs,
    lightning_layer,
    lightning_ours,
    rows,
    scan_inputs,
    ssd_inputs,
)


def _inputs(decay: tuple[int, ...] | None = None, delta: bool = False, **more: tuple[int, ...]):
    """Draw one token and a state; ``more`` names further inputs of (1, 1, H, size) or (H, size)."""

    def draw(length: int) -> dict[str, Tensor]:
        found = rows(1, decay, delta)
        for name, shape in more.items():
            found[name] = -0.1 * torch.rand(shape)
        return {**found, "initial_state": torch.randn(1, H, K, V)}

    return draw


def _step(backend: str | None) -> Callable[..., Tensor]:
    def step(**inputs: Any) -> Tensor:
        return linear_attention(**inputs, output_final_state=True, backend=backend)[0]

    return step


def _plain(*arguments, **options) -> Pair:
    return Pair(_inputs(*arguments, **options), _step(None), _step("reference"), backward=False)


def _gated_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, initial_state: Tensor
) -> Tensor:
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    step = inspect.unwrap(qwen.torch_recurrent_gated_delta_rule)
    return step(q, k, v, log_decay, beta, initial_state, True)[0]


def _kda(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, initial_state: Tensor
) -> Tensor:
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi

    step = inspect.unwrap(kimi.recurrent_kimi_delta_attention)
    return step(q, k, v, log_decay, beta, initial_state, True)[0]


# Mamba-2. Its state is (B, H, V, K): each side has one as it wants it.


def _ssd_inputs(length: int) -> dict[str, Tensor]:
    state = torch.randn(1, H, K, V)
    return {**ssd_inputs(1), "state": state, "turned_state": state.mT.contiguous()}


def _ssd_ours(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, turned_state: Tensor
) -> Tensor:
    values, decay = x * dt[..., None], dt * A
    return linear_attention(
        C, B, values, log_decay=decay, scale=1.0, initial_state=state, output_final_state=True
    )[0]


def _ssd_theirs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, turned_state: Tensor
) -> Tensor:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    step, wide = inspect.unwrap(mamba2_selective_state_update), A[:, None, None].expand(H, V, K)
    steps = dt[:, 0, :, None].expand(1, H, V)
    return step(turned_state, x[:, 0], steps, wide, B[:, 0], C[:, 0])[:, None]


# Lightning: MiniMax's layer as in ``rivals.py``, with a cache that holds one state.


class _OneState:
    def __init__(self, state: Tensor):
        self.state = state

    def get_linear_cache(self, layer_idx: int) -> Tensor:
        return self.state

    def set_linear_cache(self, layer_idx: int, state: Tensor) -> None:
        self.state = state


def _lightning_inputs(length: int) -> dict[str, Tensor]:
    return {**lightning_inputs(1), "state": torch.randn(1, H, K, V)}


def _lightning_theirs(qkv: Tensor, log_slopes: Tensor, state: Tensor) -> Tensor:
    return lightning_layer()(qkv, None, None, past_key_values=_OneState(state))[0]


def _scan_inputs(length: int) -> dict[str, Tensor]:
    return {**scan_inputs(1), "state": torch.randn(1, D, N)}


def _scan_ours(state: Tensor, D: Tensor, **inputs: Any) -> Tensor:
    return selective_scan(**inputs, D=D, initial_state=state, output_final_state=True)[0]


def _scan_theirs(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    step = inspect.unwrap(mamba_selective_state_update)
    return step(state, u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D)[:, None]


def _conv_inputs(length: int) -> dict[str, Tensor]:
    return {
        "x": torch.randn(1, 1, CONV_CHANNELS),
        "weight": torch.randn(CONV_CHANNELS, 4),
        "bias": torch.randn(CONV_CHANNELS),
        "state": torch.randn(1, CONV_CHANNELS, 3),
    }


def _conv_ours(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    return causal_conv1d(
        x, weight, bias, activation="silu", initial_state=state, output_final_state=True
    )[0]


def _conv_theirs(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_update

    return inspect.unwrap(causal_conv1d_update)(x.mT, state, weight, bias, "silu").mT


STEPS: dict[str, Pair] = {
    "step_additive": _plain(),
    "step_lightning": Pair(_lightning_inputs, lightning_ours, _lightning_theirs, backward=False),
    "step_ssd": Pair(_ssd_inputs, _ssd_ours, _ssd_theirs, backward=False),
    "step_gla": _plain((H, K)),
    "step_outer": _plain((H, K), value_log_decay=(1, 1, H, V)),
    "step_rwkv6": _plain((H, K), bonus=(H, K)),
    "step_delta": _plain(None, True),
    "step_gated_delta": Pair(_inputs((H,), True), _step(None), _gated_delta, backward=False),
    "step_kda": Pair(_inputs((H, K), True), _step(None), _kda, backward=False),
    "step_mamba1": Pair(_scan_inputs, _scan_ours, _scan_theirs, backward=False),
    "step_conv1d": Pair(_conv_inputs, _conv_ours, _conv_theirs, backward=False),
}
