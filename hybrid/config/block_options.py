"""Options of the blocks around the mixers: one value for the whole stack, or one per symbol.

A setting per symbol is a mapping whose keys are letters of the layout, ``-``, ``E``, and
``default`` for every other symbol. The branch of a mixer is looked up by its letter. The branch of
a feed-forward is looked up by its own symbol, then by the letters of the mixers in its layer, so
that a feed-forward without a setting follows its mixer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hybrid.config.declare import Number, Size, Text
from hybrid.layout import DEFAULT

POSITIONS = "ABCD"
"""Positions of canon layers; see ``hybrid.modeling.canon``."""

NormPosition = Literal["pre", "post", "sandwich", "reordered", "normed"]


@dataclass(frozen=True)
class ResidualOptions:
    """Multipliers of one residual branch, x -> skip * x + output * f(input * n(x)).

    If a norm follows the branch (``sandwich``, ``reordered``), the output multiplier is applied
    after the norm. Parallel mixers each have their own input and output multiplier, applied before
    the outputs are combined, and share one skip multiplier.

    Attributes:
        input_multiplier: multiplies the branch's input after its norm (Falcon-H1's
            ``ssm_in_multiplier`` and ``attention_in_multiplier``, arXiv 2507.22448).
        output_multiplier: multiplies its output (Granite's ``residual_multiplier``, after arXiv
            2203.03466; MiniMax-01's beta; Falcon-H1's ``ssm_out_multiplier``,
            ``attention_out_multiplier`` and, for ``-``, the second of ``mlp_multipliers``).
        skip_multiplier: multiplies the residual stream (alpha of DeepNorm, arXiv 2203.00555, and of
            MiniMax-01, arXiv 2501.08313); with 0 the branch replaces the stream. Default: 1, or
            DeepNorm's alpha with ``init: deepnorm``.
    """

    input_multiplier: Number = 1.0
    output_multiplier: Number = 1.0
    skip_multiplier: Number | None = None


@dataclass(frozen=True)
class SharedOptions:
    """Weight sharing between the layers of one symbol (Zamba2, arXiv 2411.15242).

    All parameters of such a layer are shared, including its feed-forward and its norms, except
    those that the options below add at each depth. Each layer has its own keys, values and states
    in the cache.

    Attributes:
        blocks: number of weight sets; the layers of the symbol use them in turn.
        lora_rank: rank of the LoRA adapters of each depth; null for none.
        lora_targets: the projections with an adapter, by their names in the mixer and the
            feed-forward. ``gate_proj`` and ``up_proj`` read the same input and share one A.
        concat_embeddings: the mixer reads [x, e] of width 2 D, where e is the input of the stack.
        depth_projection: a linear map, one per depth, applied to the output of the block.
        output: use of the output: it replaces the stream (``replace``), is added to it
            (``add``), or is added to the input of the first branch of the next layer only
            (``next``).
    """

    blocks: Size = 1
    lora_rank: Size | None = None
    lora_targets: list[Text] | tuple[Text, ...] = ("gate_proj", "up_proj")
    concat_embeddings: bool = False
    depth_projection: bool = False
    output: Literal["replace", "add", "next"] = "replace"


def pick(setting: Any, symbols: Iterable[str], fallback: Any) -> Any:
    """Return the value of a setting for the first of ``symbols`` in it, or the setting itself."""
    if setting is None:
        return fallback
    if not isinstance(setting, Mapping):
        return setting
    for symbol in symbols:
        if symbol in setting:
            return setting[symbol]
    return setting.get(DEFAULT, fallback)


def scaled(x: torch.Tensor, multiplier: float | None) -> torch.Tensor:
    """Return x * multiplier; x itself, without a kernel, if the multiplier is 1 or None."""
    return x if multiplier is None or multiplier == 1 else x * multiplier
