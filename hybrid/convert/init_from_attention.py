"""What each mixer takes over from the softmax attention that it replaces, and where its gates start.

Shapes: H query heads, K head dim.

One table, `INIT_FROM_ATTENTION`. Gates start near the identity: memory long, output gate open,
convolutions passing the present token on, norms at 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hybrid.config.registry import mixers as registered
from hybrid.mixers.base import ShortConvolution
from hybrid.mixers.grouped_heads import GroupedHeadOptions

Value = float | Callable[[Any], torch.Tensor]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
OPEN_SILU = 1.2784645427610738
"""silu(b) = 1: the bias of an output gate that starts open."""


@dataclass(frozen=True)
class InitFromAttention:
    """How one mixer takes over from softmax attention.

    Attributes:
        options: the softmax's completed options -> options of the new mixer.
        start: parameter -> where it starts, a number or a function of the new mixer. Names that a
            mixer does not have with its options are passed over; what is not named starts as in
            training from scratch.
        carried: modules and parameters that are taken over under their own names where both have
            them; keys and values are repeated where each query head has its own.
        keeps: options of the softmax that still mean something. The others are dropped, with a
            warning where they are set.
    """

    options: Callable[[GroupedHeadOptions], dict[str, Any]]
    start: Mapping[str, Value] = field(default_factory=dict)
    carried: tuple[str, ...] = PROJECTIONS
    keeps: tuple[str, ...] = ()

    def lost(self, softmax: GroupedHeadOptions, new: Any) -> set[str]:
        """Options of the softmax that are set and mean nothing with those of the new mixer."""
        kept = set(self.keeps)
        if getattr(new, "rope_theta", softmax) is None:
            kept.discard("rope_parameters")
        values = {name: getattr(softmax, name, neutral) for name, neutral in NEUTRAL.items()}
        return {name for name, value in values.items() if value != NEUTRAL[name]} - kept

    @torch.no_grad()
    def open(self, mixer: nn.Module) -> None:
        """Put the gates and convolutions of a new mixer where they start."""
        parameters = dict(mixer.named_parameters())
        for name, value in self.start.items():
            if name in parameters:
                parameters[name].copy_(torch.as_tensor(value(mixer) if callable(value) else value))
        for module in mixer.modules():
            if isinstance(module, ShortConvolution):
                module.weight.zero_()[:, -1] = 1.0


def _memory(mixer: Any) -> torch.Tensor:
    """Tokens that each head remembers, (H,): from 32 to 4096, as RetNet spreads its decays."""
    return torch.exp2(torch.linspace(5, 12, mixer.num_heads))


def _before_softplus(y: torch.Tensor) -> torch.Tensor:
    return y + torch.log(-torch.expm1(-y))


def _step_of_memory(mixer: Any) -> torch.Tensor:
    """dt_bias so that, with A_log and the projection 0, a head decays by exp(-1 / memory); (H,)."""
    return _before_softplus(1 / _memory(mixer))


def _step_of_channels(mixer: Any) -> torch.Tensor:
    """The same for each key channel, (H * K,)."""
    return _step_of_memory(mixer).repeat_interleave(mixer.key_dim)


def _logit_of_channels(mixer: Any) -> torch.Tensor:
    """The bias of sigmoid(.)^(1 / tau) with the same decays, one for each key channel, (H * K,)."""
    kept = torch.exp(-mixer.options.tau / _memory(mixer).double())
    return torch.logit(kept).repeat_interleave(mixer.key_dim)


def _heads(softmax: GroupedHeadOptions) -> dict[str, Any]:
    heads, _, head_dim = softmax.sizes
    return {"num_heads": heads, "head_dim": head_dim, "value_head_dim": head_dim}


def _plain(softmax: GroupedHeadOptions) -> dict[str, Any]:
    gate = {"output_gate": True} if softmax.output_gate else {}
    return {**_heads(softmax), "output_norm": "head", "bias": softmax.bias, **gate}


def _ungated(softmax: GroupedHeadOptions) -> dict[str, Any]:
    # a SiLU gate without bias cannot start open
    return {**_heads(softmax), "output_gate": False}


def _mamba2(softmax: GroupedHeadOptions) -> dict[str, Any]:
    heads, _, head_dim = softmax.sizes
    sizes = {"num_heads": heads, "num_groups": heads, "head_dim": head_dim, "state_size": head_dim}
    return {**sizes, "bias": True}  # for the bias of the gate


def _lightning(softmax: GroupedHeadOptions) -> dict[str, Any]:
    theta, share = _plain_rope(softmax)
    return {**_plain(softmax), "rope_theta": theta, "rotary_share": share}


def _retention(softmax: GroupedHeadOptions) -> dict[str, Any]:
    theta, share = _plain_rope(softmax)
    return {**_heads(softmax), "rope_theta": theta if share == 1.0 else None}


def _plain_rope(softmax: GroupedHeadOptions) -> tuple[float | None, float]:
    """Base and rotated share of RoPE; no base where there is none, or one of stretched frequencies."""
    rope = softmax.rope_parameters or {}
    plain = rope.get("rope_type", "default") == "default"
    return rope.get("rope_theta") if plain else None, rope.get("partial_rotary_factor", 1.0)


def _attention(name: str) -> InitFromAttention:
    """Attention from attention: everything that both have."""
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
    # fixed decays; a sigmoid gate that starts at 1/2 everywhere
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
    # time steps of 1, so that values are written as they are; no skip, for softmax has none
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

# Options of softmax attention that change what it computes, and the values that do not.
NEUTRAL: dict[str, Any] = {
    "rope_parameters": None, "qk_norm": None, "bias": False, "output_bias": False,
    "output_gate": False, "sinks": False, "soft_cap": None, "alibi": False, "conv_size": None,
    "temperature": None, "dual_chunk_size": None,
}  # fmt: skip
