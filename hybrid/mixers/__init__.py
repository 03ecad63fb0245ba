"""Token mixers: importing this package registers them all."""

from hybrid.mixers import (
    delta_net,
    gated_delta_net,
    gated_linear_attention,
    kimi_delta_attention,
    lightning_attention,
    mamba2,
    norm_attention,
    softmax_attention,
)
from hybrid.mixers.base import LinearMixer, Mixer, MixerOptions, ShortConvolution, StateMixer

__all__ = [
    "LinearMixer",
    "Mixer",
    "MixerOptions",
    "ShortConvolution",
    "StateMixer",
    "delta_net",
    "gated_delta_net",
    "gated_linear_attention",
    "kimi_delta_attention",
    "lightning_attention",
    "mamba2",
    "norm_attention",
    "softmax_attention",
]
