"""HGRN-2: a forget gate with a lower bound per layer, tied to the keys (arXiv 2404.07904)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.cache import LayerCache
from hybrid.mixers.base import LinearMixer, OutputNorm
from hybrid.mixers.parts import HeadOptions, wide
from hybrid.registry import register_mixer

if TYPE_CHECKING:
    from hybrid.config import HybridConfig


@dataclass(frozen=True)
class HGRN2Options(HeadOptions):
    """Options of `hgrn2`.

    Attributes:
        num_heads: H; default D / 128, at least 1.
        head_dim: key dim K, by how much the state is expanded; default V, or D / H.
        value_head_dim: value dim V; default K.
        conv_size: width of a short convolution on q, k, v; null for none, as in the paper.
        lower_bound: keep the forget gate above a learned gamma per key channel, which starts at l / n
            in layer l (from 0) of n, so that upper layers remember longer; else gamma is 0.
    """

    conv_size: int | None = None
    lower_bound: bool = True

    width = 128


@register_mixer("hgrn2", symbol="H")
class HGRN2(LinearMixer):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, f_t = gamma + (1 - gamma) sigmoid(x W_f).

    q = silu(x W_q), k = 1 - f, v = x W_v; output RMSNorm(q_t^T S_t) over all heads (arXiv 2404.07904,
    section 3). The paper computes the gammas of all layers as one cumulative softmax over depth; here
    each layer owns its gamma = sigmoid(b), which starts where theirs starts.
    """

    Options = HGRN2Options
    paper = "arXiv 2404.07904"
    formula = "G_t = alpha_t^T 1, alpha_t = gamma + (1 - gamma) sigmoid(x_t W_a), k_t = 1 - alpha_t"
    used_by = "HGRN-2"

    def __init__(self, options: HGRN2Options, config: HybridConfig, layer_idx: int) -> None:
        super().__init__(options, config, layer_idx)
        heads, key_dim, value_dim = options.sizes
        # k_proj gives the logits of the forget gate, from which the key follows
        self.build(heads, key_dim, value_dim, options.conv_size)
        self.lower_bound_logit = None
        if options.lower_bound:
            self.lower_bound_logit = nn.Parameter(torch.empty(heads, key_dim))
        self.norm = OutputNorm("layer", heads, value_dim, config.norm_eps)

    no_weight_decay = ("lower_bound_logit",)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """As the paper has it; unequal dims, a convolution, no bound."""
        return [
            {"num_heads": 2},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, "conv_size": 4,
             "lower_bound": False},
        ]  # fmt: skip

    def init_parameters(self, std: float) -> None:
        """gamma = l / n in layer l of n, but 0.01 in the first: from 0 it would never move."""
        if self.lower_bound_logit is not None:
            gamma = max(0.01, self.layer_idx / (self.config.num_hidden_layers or 1))
            init.constant_(self.lower_bound_logit, math.log(gamma / (1 - gamma)))

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: LayerCache | None
    ) -> torch.Tensor:
        """See the class."""
        q, f, v = self.project(x, cu_seqlens, cache)
        # log f and 1 - f, each from logsigmoids, for neither 1 - sigmoid nor log(sum) keeps its digits
        f = wide(f)
        log_f, k = F.logsigmoid(f), torch.sigmoid(-f)
        if self.lower_bound_logit is not None:
            b = wide(self.lower_bound_logit)
            log_f = torch.logaddexp(F.logsigmoid(b), F.logsigmoid(-b) + log_f)
            k = torch.sigmoid(-b) * k
        o = self.recur(F.silu(q), k.to(v.dtype), v, cu_seqlens, cache, log_decay=log_f)
        return self.o_proj(self.norm(o))
