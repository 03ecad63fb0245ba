"""Token mixers: importing this package registers them all."""

from hybrid.mixers import lightning_attention, norm_attention, softmax_attention
from hybrid.mixers.base import LinearMixer, Mixer, MixerOptions, ShortConvolution

__all__ = [
    "LinearMixer",
    "Mixer",
    "MixerOptions",
    "ShortConvolution",
    "lightning_attention",
    "norm_attention",
    "softmax_attention",
]
