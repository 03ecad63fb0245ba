"""Maximal update parametrisation (muP): transfer hyperparameters from a small width to a large one.

With ``mup_base_width`` w, the hyperparameters tuned at width w stay optimal as hidden_size D grows
(Tensor Programs V, arXiv 2203.03466, table 8, for Adam; as in Cerebras-GPT, arXiv 2304.03208). At D = w
nothing changes. Each matrix is compared with the same matrix of the config at width w, which is built on
the meta device. Sizes set in the config are therefore fixed: to get more heads at a larger D, set
``head_dim``; to get larger heads, set ``num_heads``.

                                     initial std          learning rate        elsewhere
    hidden (both sides grow, by r)   / sqrt(r)            / r
    to few (only the input grows)    / r                  / r                  (gates, routers)
    from few, embedding, vectors     unchanged            unchanged
    output head                      unchanged            unchanged            logits / (D / w)
    softmax attention                                                          scale 1 / d, where the
                                                                               head dim d grows

The weight decay of a matrix is multiplied by r, as in the authors' package, so that its product with the
learning rate in AdamW is unchanged. Muon is unchanged, as the norm of its update does not depend on the
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrid.ffn.moe import Experts
from hybrid.ffn.router import Router


@dataclass(frozen=True)
class Growth:
    """Ratios of the two sides of a matrix to those at the base width."""

    fan_in: float
    fan_out: float

    @property
    def std_factor(self) -> float:
        """Factor of the initial standard deviation."""
        return 1 / self.fan_in if self.fan_out == 1 else self.fan_in**-0.5

    @property
    def rate_factor(self) -> float:
        """Factor of the learning rate."""
        return 1 / self.fan_in


def find_growth(model: Any) -> dict[nn.Module, dict[str, Growth]]:
    """Return the growth of the matrices of each module that muP scales; empty without muP."""
    if model.config.mup_base_width is None:
        return {}
    with torch.device("meta"):
        small: Any = type(model)(
            model.config.changed(hidden_size=model.config.mup_base_width, mup_base_width=None)
        )
    twins = dict(small.named_modules())
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Experts, Router)) and module is not head:
            twin = dict(twins[name].named_parameters(recurse=False))
            found[module] = {
                key: Growth(
                    *(a / b for a, b in zip(p.shape[:-3:-1], twin[key].shape[:-3:-1], strict=True))
                )
                for key, p in module.named_parameters(recurse=False)
                if p.ndim > 1 and not key.endswith("_bias")
            }
    return found
