"""What ``bench.py`` compares for one decoded token: each form's step, and somebody else's.

Where transformers has a step for machines without a GPU, that; where it has none, the definition in
``reference.py``, one step of which is the formula written out. Both sides have a state of their own
and give the next one; ours overwrites it, as in the decode loop of a model (but the convolution's,
which it cannot), and those of transformers update theirs in place or return a new one, as they are
written.

Shapes: B = 1 batch, H heads, K key dim, V value dim, D channels, N state size.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from baselines import (
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
from hybrid_kernels.api import causal_conv1d, linear_attention, selective_scan


def _states(*shape: int) -> dict[str, Tensor]:
    """Draw a state, once for each side."""
    state = torch.randn(shape)
    return {"state": state, "their_state": state.clone()}


@functools.cache
def _fallback(model: str, name: str) -> Callable:
    """Return a function of transformers' code for a model; no timed call should look for it."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return inspect.unwrap(getattr(module, name))


def _inputs(decay: tuple[int, ...] | None = None, delta: bool = False, **more: tuple[int, ...]):
    """Draw one token and a state; ``more`` names further inputs of (1, 1, H, size) or (H, size)."""

    def draw(length: int) -> dict[str, Tensor]:
        found = rows(1, decay, delta)
        for name, shape in more.items():
            found[name] = -0.1 * torch.rand(shape)
        return {**found, **_states(1, H, K, V)}

    return draw


def _plain_ours(state: Tensor, their_state: Tensor, **inputs: Any) -> Tensor:
    return linear_attention(
        **inputs, initial_state=state, output_final_state=True, overwrite_state=True
    )[0]


def _plain_theirs(state: Tensor, their_state: Tensor, **inputs: Any) -> Tensor:
    return linear_attention(
        **inputs, initial_state=their_state, output_final_state=True, backend="reference"
    )[0]


def _plain(*arguments, **options) -> Pair:
    return Pair(_inputs(*arguments, **options), _plain_ours, _plain_theirs, backward=False)


def _delta_ours(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor,
    their_state: Tensor,
) -> Tensor:
    return linear_attention(
        q,
        k,
        v,
        log_decay=log_decay,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        overwrite_state=True,
    )[0]


def _delta_theirs(model: str, name: str) -> Callable[..., Tensor]:
    def step(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor,
        state: Tensor,
        their_state: Tensor,
    ) -> Tensor:
        return _fallback(model, name)(q, k, v, log_decay, beta, their_state, True)[0]

    return step


_gated_delta_theirs = _delta_theirs("qwen3_next", "torch_recurrent_gated_delta_rule")
_kda_theirs = _delta_theirs("kimi_linear", "recurrent_kimi_delta_attention")


# Mamba-2. Its state is (B, H, V, K): each side has one as it wants it.


def _ssd_inputs(length: int) -> dict[str, Tensor]:
    found = {**ssd_inputs(1), **_states(1, H, K, V)}
    return {**found, "their_state": found["their_state"].mT.contiguous()}


def _ssd_ours(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, their_state: Tensor
) -> Tensor:
    return linear_attention(
        C,
        B,
        x,
        log_decay=dt * A,
        write_scale=dt,
        scale=1.0,
        initial_state=state,
        output_final_state=True,
        overwrite_state=True,
    )[0]


def _ssd_theirs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, their_state: Tensor
) -> Tensor:
    step, wide = _fallback("mamba2", "mamba2_selective_state_update"), A[:, None, None]
    steps = dt[:, 0, :, None].expand(1, H, V)
    return step(their_state, x[:, 0], steps, wide.expand(H, V, K), B[:, 0], C[:, 0])[:, None]


# Lightning: MiniMax's layer as in ``baselines.py``, with a cache that holds one state.


class _OneState:
    def __init__(self, state: Tensor):
        self.state = state

    def get_linear_cache(self, layer_idx: int) -> Tensor:
        return self.state

    def set_linear_cache(self, layer_idx: int, state: Tensor) -> None:
        self.state = state


def _lightning_inputs(length: int) -> dict[str, Tensor]:
    return {**lightning_inputs(1), **_states(1, H, K, V)}


def _lightning_ours(qkv: Tensor, log_slopes: Tensor, state: Tensor, **_) -> Tensor:
    return lightning_ours(qkv, log_slopes, state)


def _lightning_theirs(
    qkv: Tensor, log_slopes: Tensor, state: Tensor, their_state: Tensor
) -> Tensor:
    return lightning_layer()(qkv, None, None, past_key_values=_OneState(their_state))[0]


def _scan_inputs(length: int) -> dict[str, Tensor]:
    return {**scan_inputs(1), **_states(1, D, N)}


def _scan_ours(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, **_
) -> Tensor:
    return selective_scan(
        u, delta, A, B, C, D, initial_state=state, output_final_state=True, overwrite_state=True
    )[0]


def _scan_theirs(
    their_state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **_
) -> Tensor:
    step = _fallback("mamba", "mamba_selective_state_update")
    return step(their_state, u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D)[:, None]


def _conv_inputs(length: int) -> dict[str, Tensor]:
    return {
        "x": torch.randn(1, 1, CONV_CHANNELS),
        "weight": torch.randn(CONV_CHANNELS, 4),
        "bias": torch.randn(CONV_CHANNELS),
        **_states(1, CONV_CHANNELS, 3),
    }


def _conv_ours(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, **_) -> Tensor:
    return causal_conv1d(
        x, weight, bias, activation="silu", initial_state=state, output_final_state=True
    )[0]


def _conv_theirs(x: Tensor, weight: Tensor, bias: Tensor, their_state: Tensor, **_) -> Tensor:
    step = _fallback("mamba2", "causal_conv1d_update")
    return step(x.mT, their_state, weight, bias, "silu").mT


STEPS: dict[str, Pair] = {
    "step_additive": _plain(),
    "step_lightning": Pair(_lightning_inputs, _lightning_ours, _lightning_theirs, backward=False),
    "step_ssd": Pair(_ssd_inputs, _ssd_ours, _ssd_theirs, backward=False),
    "step_gla": _plain((H, K)),
    "step_outer": _plain((H, K), value_log_decay=(1, 1, H, V)),
    "step_rwkv6": _plain((H, K), bonus=(H, K)),
    "step_delta": _plain(None, True),
    "step_gated_delta": Pair(_inputs((H,), True), _delta_ours, _gated_delta_theirs, backward=False),
    "step_kda": Pair(_inputs((H, K), True), _delta_ours, _kda_theirs, backward=False),
    "step_mamba1": Pair(_scan_inputs, _scan_ours, _scan_theirs, backward=False),
    "step_conv1d": Pair(_conv_inputs, _conv_ours, _conv_theirs, backward=False),
}
