"""Hybrid language models: softmax attention, linear attention and state-space layers in one stack.

Importing this package registers its classes with transformers' Auto classes.
"""

from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.options import ConfigError
from hybrid.config.registry import register_feed_forward, register_mixer
from hybrid.hub import register_auto_classes
from hybrid.layout import LayoutError
from hybrid.mixers import LinearMixer, Mixer, MixerOptions
from hybrid.modeling.classification import (
    HybridForSequenceClassification,
    HybridForTokenClassification,
)
from hybrid.modeling.model import HybridForCausalLM, HybridModel

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridForSequenceClassification",
    "HybridForTokenClassification",
    "HybridModel",
    "LayoutError",
    "LinearMixer",
    "Mixer",
    "MixerOptions",
    "register_feed_forward",
    "register_mixer",
]

register_auto_classes()
