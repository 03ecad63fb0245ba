"""Initialisation of each mixer from the softmax attention that it replaces, and its initial gates.

Shapes: H query heads, K head dim.

The table is ``INIT_FROM_ATTENTION``. Gates start near the identity: a long memory, an open output
gate, convolutions as the identity, and norms at 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hybrid.config.registry import mixers as registered
from hybrid.mixers.grouped_heads import GroupedHeadOptions
from hybrid.mixers.short_convolution import ShortConvolution

Value = float | Callable[[Any], torch.Tensor]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
OPEN_SILU = 1.2784645427610738
"""silu(b) = 1: the bias of an output gate that is open at the start."""


@dataclass(frozen=True)
class InitFromAttention:
    """Initialisation of one mixer from softmax attention.

    Attributes:
        options: the completed options of the softmax mixer -> options of the new mixer.
        start: parameter -> initial value, a number or a function of the new mixer. Parameters that
            the mixer does not have with its options are skipped. All others are initialised as in
            training from scratch.
        carried: modules and parameters copied by name if both mixers have them; keys and values are
            repeated if each query head has its own.
        keeps: options of the softmax mixer that still apply. Other options are dropped, with a
            warning if set.
    """

    options: Callable[[GroupedHeadOptions], dict[str, Any]]
    start: Mapping[str, Value] = field(default_factory=dict)
    carried: tuple[str, ...] = PROJECTIONS
    keeps: tuple[str, ...] = ()

    def lost(self, softmax: GroupedHeadOptions, new: Any) -> set[str]:
        """Return the options of the softmax mixer that are set but have no effect in the new mixer."""
        kept = set(self.keeps)
        if getattr(new, "rope_theta", softmax) is None:
            kept.discard("rope_parameters")
        values = {name: getattr(softmax, name, neutral) for name, neutral in NEUTRAL.items()}
        return {name for name, value in values.items() if value != NEUTRAL[name]} - kept

    @torch.no_grad()
    def open(self, mixer: nn.Module) -> None:
        """Set the gates and convolutions of a new mixer to their initial values."""
        parameters = dict(mixer.named_parameters())
        for name, value in self.start.items():
            if name in parameters:
                parameters[name].copy_(torch.as_tensor(value(mixer) if callable(value) else value))
        for module in mixer.modules():
            if isinstance(module, ShortConvolution):
                module.weight.zero_()[:, -1] = 1.0


def _memory(mixer: Any) -> torch.Tensor:
    """Return the memory of each head in tokens, (H,): 32 to 4096, spaced like RetNet's decays."""
    return torch.exp2(torch.linspace(5, 12, mixer.num_heads))


def _before_softplus(y: torch.Tensor) -> torch.Tensor:
    return y + torch.log(-torch.expm1(-y))


def _step_of_memory(mixer: Any) -> torch.Tensor:
    """Return dt_bias, (H,): with A_log and the projection at 0, a head decays by exp(-1 / memory)."""
    return _before_softplus(1 / _memory(mixer))


def _step_of_channels(mixer: Any) -> torch.Tensor:
    """Return the same for each key channel, (H * K,)."""
    return _step_of_memory(mixer).repeat_interleave(mixer.key_dim)


def _logit_of_channels(mixer: Any) -> torch.Tensor:
    """Return the bias of sigmoid(.)^(1 / tau) with the same decays, for each key channel, (H * K,)."""
    kept = torch.exp(-mixer.options.tau / _memory(mixer).double())
    return torch.logit(kept).repeat_interleave(mixer.key_dim)


def _heads(softmax: GroupedHeadOptions) -> dict[str, Any]:
    heads, _, head_dim = softmax.sizes
    return {"num_heads": heads, "head_dim": head_dim, "value_head_dim": head_dim}


def _plain(softmax: GroupedHeadOptions) -> dict[str, Any]:
    gate = {"output_gate": True} if softmax.output_gate else {}
    return {**_heads(softmax), "output_norm": "head", "bias": softmax.bias, **gate}


def _ungated(softmax: GroupedHeadOptions) -> dict[str, Any]:
    # a SiLU gate without bias cannot be open at the start
    return {**_heads(softmax), "output_gate": False}


def _mamba2(softmax: GroupedHeadOptions) -> dict[str, Any]:
    heads, _, head_dim = softmax.sizes
    sizes = {"num_heads": heads, "num_groups": heads, "head_dim": head_dim, "state_size": head_dim}
    return {**sizes, "bias": True}  # the gate needs a bias


def _lightning(softmax: GroupedHeadOptions) -> dict[str, Any]:
    theta, share = _plain_rope(softmax)
    return {**_plain(softmax), "rope_theta": theta, "rotary_share": share}


def _retention(softmax: GroupedHeadOptions) -> dict[str, Any]:
    theta, share = _plain_rope(softmax)
    return {**_heads(softmax), "rope_theta": theta if share == 1.0 else None}


def _plain_rope(softmax: GroupedHeadOptions) -> tuple[float | None, float]:
    """Return base and rotary fraction of RoPE; no base without RoPE or with scaled frequencies."""
    rope = softmax.rope_parameters or {}
    plain = rope.get("rope_type", "default") == "default"
    return rope.get("rope_theta") if plain else None, rope.get("partial_rotary_factor", 1.0)


def _attention(name: str) -> InitFromAttention:
    """Return the initialisation of attention from attention: all common parameters are copied."""
    names = [f.name for f in dataclasses.fields(registered.get(name).Options)]

    def options(softmax: GroupedHeadOptions) -> dict[str, Any]:
        return {name: getattr(softmax, name) for name in names if hasattr(softmax, name)}

    carried = (*PROJECTIONS, "gate_proj", "q_norm", "k_norm", "sinks")
    return InitFromAttention(options, carried=carried, keeps=tuple(names))


_CLOSED_DECAY: dict[str, Value] = {"A_log": 0.0, "decay_proj.weight": 0.0}
_HALF_BETA: dict[str, Value] = {"beta_proj.weight": 0.0}
_OPEN_GATE: dict[str, Value] = {"gate_proj.weight": 0.0, "gate_proj.bias": OPEN_SILU}
_HALF_GATE: dict[str, Value] = {"gate_proj.weight": 0.0, "gate_proj.1.weight": 0.0}

INIT_FROM_ATTENTION: dict[str, InitFromAttention] = {
    "softmax_attention": _attention("softmax_attention"),
    "sliding_window_attention": _attention("sliding_window_attention"),
    "chunked_attention": _attention("chunked_attention"),
    # fixed decays; a sigmoid gate that starts at 1/2
    "lightning_attention": InitFromAttention(
        _lightning,
        _HALF_GATE,
        (*PROJECTIONS, "gate_proj"),
        keeps=("bias", "output_gate", "rope_parameters"),
    ),
    "norm_attention": InitFromAttention(
        _plain, _HALF_GATE, (*PROJECTIONS, "gate_proj"), keeps=("bias", "output_gate")
    ),
    "retention": InitFromAttention(_retention, keeps=("rope_parameters",)),
    "delta_net": InitFromAttention(_ungated, _HALF_BETA),
    "gated_delta_net": InitFromAttention(
        _ungated, {**_HALF_BETA, **_CLOSED_DECAY, "dt_bias": _step_of_memory}
    ),
    "kimi_delta_attention": InitFromAttention(
        _heads,
        {
            **_HALF_BETA,
            **_HALF_GATE,
            **_CLOSED_DECAY,
            "decay_proj.1.weight": 0.0,
            "dt_bias": _step_of_channels,
        },
    ),
    # time steps of 1, so that values are written unscaled; no skip, because softmax has none
    "mamba2": InitFromAttention(
        _mamba2,
        {
            **_OPEN_GATE,
            "dt_proj.weight": 0.0,
            "dt_bias": lambda mixer: _before_softplus(torch.ones(mixer.num_heads)),
            "A_log": lambda mixer: -_memory(mixer).log(),
            "D": 0.0,
        },
        keeps=("bias", "output_bias"),
    ),
    "gated_linear_attention": InitFromAttention(
        _heads,
        {**_OPEN_GATE, "decay_proj.1.weight": 0.0, "decay_proj.1.bias": _logit_of_channels},
    ),
}

# Options of softmax attention that affect its computation, with their neutral values.
NEUTRAL: dict[str, Any] = {
    "rope_parameters": None, "qk_norm": None, "bias": False, "output_bias": False,
    "output_gate": False, "sinks": False, "soft_cap": None, "alibi": False, "conv_size": None,
    "temperature": None, "dual_chunk_size": None,
}  # fmt: skip
