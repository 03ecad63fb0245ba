"""Modules whose back-end transformers looks up in the model's config each time they run."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from hybrid.ffn.moe import Experts
from hybrid.mixers.attention import SoftmaxMixer


def use_backends_of(config: PreTrainedConfig, module: nn.Module) -> None:
    """Give the config to softmax mixers (`attn_implementation`) and experts (`experts_implementation`).

    transformers' attention and experts functions read them from `module.config`.
    """
    for part in module.modules():
        if isinstance(part, (SoftmaxMixer, Experts)):
            part.config = config
