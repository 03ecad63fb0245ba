"""What stands around the mixers, setting by setting: one value for the stack, or one by symbol.

A setting by symbol is a mapping whose keys are letters of the layout, `-`, `E`, and `default` for all
that is not named. A mixer's branch is looked up by its letter. A feed-forward's is looked up by its own
symbol, then by the letters of the mixers in its layer: without a word on feed-forwards, each follows
its mixer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hybrid.config.declare import Number, Size, Text
from hybrid.layout import DEFAULT

POSITIONS = "ABCD"
"""Of canon layers, see `hybrid.modeling.canon`."""

NormPosition = Literal["pre", "post", "sandwich", "reordered", "normed"]


@dataclass(frozen=True)
class ResidualOptions:
    """Multipliers of one residual branch: x becomes skip * x + output * f(input * n(x)).

    Where a norm stands behind the branch (`sandwich`, `reordered`), the output multiplier stands behind
    the norm. Mixers side by side have each their own input and output multiplier, before they are
    combined, and one skip multiplier.

    Attributes:
        input_multiplier: of the branch's input, after its norm (Falcon-H1's `ssm_in_multiplier` and
            `attention_in_multiplier`, arXiv 2507.22448).
        output_multiplier: of its output (Granite's `residual_multiplier`, after arXiv 2203.03466;
            MiniMax-01's beta; Falcon-H1's `ssm_out_multiplier`, `attention_out_multiplier` and, for
            `-`, the second of `mlp_multipliers`).
        skip_multiplier: of the stream (alpha of DeepNorm, arXiv 2203.00555, and of MiniMax-01, arXiv
            2501.08313); 0: the branch takes the place of the stream. Default 1, and DeepNorm's alpha
            under `init: deepnorm`.
    """

    input_multiplier: Number = 1.0
    output_multiplier: Number = 1.0
    skip_multiplier: Number | None = None


@dataclass(frozen=True)
class SharedOptions:
    """How the layers of one symbol share their weights (Zamba2, arXiv 2411.15242).

    All that such a layer is made of is shared, its feed-forward and its norms too, but for what the
    options below give to each depth. Keys and states are each layer's own.

    Attributes:
        blocks: sets of weights; the layers of the symbol take them in turn.
        lora_rank: rank of the adapters that each depth has; null for none.
        lora_targets: the projections that have one, by their names in the mixer and the feed-forward.
            `gate_proj` and `up_proj` read the same input, and have one A between them.
        concat_embeddings: the mixer reads [x, e], twice as wide, e what the stack began with.
        depth_projection: a linear map of each depth on what the block gives.
        output: what becomes of it: it takes the place of the stream (`replace`), is added to it
            (`add`), or to what the first branch of the next layer reads, and not to the stream (`next`).
    """

    blocks: Size = 1
    lora_rank: Size | None = None
    lora_targets: list[Text] | tuple[Text, ...] = ("gate_proj", "up_proj")
    concat_embeddings: bool = False
    depth_projection: bool = False
    output: Literal["replace", "add", "next"] = "replace"


def pick(setting: Any, symbols: Iterable[str], fallback: Any) -> Any:
    """The value of a setting for the first of `symbols` that it names; itself if it is no mapping."""
    if setting is None:
        return fallback
    if not isinstance(setting, Mapping):
        return setting
    for symbol in symbols:
        if symbol in setting:
            return setting[symbol]
    return setting.get(DEFAULT, fallback)


def scaled(x: torch.Tensor, multiplier: float | None) -> torch.Tensor:
    """x * multiplier, without a pass over x where that is x."""
    return x if multiplier is None or multiplier == 1 else x * multiplier
