"""Maximal update parametrisation: settings found at a small width hold at a large one (muP).

With `mup_base_width` w the model behaves, as hidden_size D grows, like one of width w (Tensor Programs
V, arXiv 2203.03466, table 8, for Adam; as in Cerebras-GPT, arXiv 2304.03208). At D = w nothing changes.
A matrix is held against the same matrix of the same config at width w, which is built without memory.
So sizes that the config names count as fixed: for more heads at a larger D name `head_dim`, for larger
ones `num_heads`.

                                     initial std          learning rate        elsewhere
    hidden (both sides grow, by r)   / sqrt(r)            / r
    to few (only the input grows)    / r                  / r                  (gates, routers)
    from few, embedding, vectors     as it is             as it is
    output head                      as it is             as it is             logits / (D / w)
    softmax attention                                                          scale 1 / d, where the
                                                                               head dim d grows

Weight decay of a matrix is multiplied by r, so that AdamW's product with the learning rate stays, as in
the authors' package. Muon, whose update has a width-free norm already, is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from hybrid.ffn.moe import Experts
from hybrid.ffn.router import Router


@dataclass(frozen=True)
class Growth:
    """How much longer the two sides of a matrix are than at the base width."""

    fan_in: float
    fan_out: float

    @property
    def std_factor(self) -> float:
        """Of the std that it is initialised with."""
        return 1 / self.fan_in if self.fan_out == 1 else self.fan_in**-0.5

    @property
    def rate_factor(self) -> float:
        """Of its learning rate."""
        return 1 / self.fan_in


def mark(model: Any) -> None:
    """Note on each module of a hybrid model how much its matrices have grown; before initialisation."""
    if model.config.mup_base_width is None:
        return
    with torch.device("meta"):
        small: Any = type(model)(
            model.config.changed(hidden_size=model.config.mup_base_width, mup_base_width=None)
        )
    twins = dict(small.named_modules())
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Experts, Router)) and module is not head:
            twin = dict(twins[name].named_parameters(recurse=False))
            module.growth = {  # type: ignore[assignment]
                key: Growth(
                    *(a / b for a, b in zip(p.shape[:-3:-1], twin[key].shape[:-3:-1], strict=True))
                )
                for key, p in module.named_parameters(recurse=False)
                if p.ndim > 1 and not key.endswith("_bias")
            }


def scale_initial(module: nn.Module) -> None:
    """Bring matrices that have just been initialised to the std of their growth."""
    for key, growth in getattr(module, "growth", {}).items():
        parameter = getattr(module, key)
        init.copy_(parameter, parameter * growth.std_factor)


def growths(model: nn.Module) -> dict[str, Growth]:
    """Names of the parameters whose learning rate muP changes, and how much they have grown."""
    return {
        f"{name}.{key}" if name else key: growth
        for name, module in model.named_modules()
        for key, growth in getattr(module, "growth", {}).items()
        if growth.rate_factor != 1
    }
