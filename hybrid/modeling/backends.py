"""Config of the modules whose backend transformers looks up in the model's config in each forward."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from hybrid.ffn.moe import Experts
from hybrid.mixers.attention import SoftmaxMixer


def use_backends_of(config: PreTrainedConfig, module: nn.Module) -> None:
    """Set ``config`` on softmax mixers and experts.

    transformers' functions read ``attn_implementation`` and ``experts_implementation`` from
    ``module.config``.
    """
    for part in module.modules():
        if isinstance(part, (SoftmaxMixer, Experts)):
            part.config = config
