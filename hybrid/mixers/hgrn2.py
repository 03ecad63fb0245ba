"""HGRN-2: a forget gate with a lower bound per layer, tied to the keys (arXiv 2404.07904)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.declare import Positive, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.linear_mixer import LinearMixer, OutputNorm
from hybrid.mixers.parts import HeadOptions, to_float32
from hybrid.nn.past import Slot


@dataclass(frozen=True)
class HGRN2Options(HeadOptions):
    """Options of ``hgrn2``.

    Attributes:
        num_heads: H; default D / 128, at least 1.
        head_dim: key dim K, the expansion of the state; default V, or D / H.
        value_head_dim: value dim V; default K.
        conv_size: width of a short convolution on q, k, v; null for no convolution, as in the paper.
        scale: factor of q^T S, before the norm.
        output_norm_eps: epsilon of the output norm; default the model's ``norm_eps``.
        lower_bound: keep the forget gate above a learned gamma per key channel. It starts at l / n in
            layer l (from 0) of n, so that higher layers forget more slowly. False: gamma is 0.
        bounds_over_depth: compute gamma from one matrix B of the whole stack, with one row for each
            layer that has a mixer: gamma_l is the sum of rows 1 to l of softmax(B) over depth, and 0 in
            the first layer.
    """

    conv_size: Size2 | None = None
    scale: Positive = 1.0
    output_norm_eps: Positive | None = None
    lower_bound: bool = True
    bounds_over_depth: bool = False

    width = 128


@register_mixer("hgrn2", symbol="H")
class HGRN2(LinearMixer):
    """HGRN-2 mixer (arXiv 2404.07904, section 3).

    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, f_t = gamma + (1 - gamma) sigmoid(x W_f).

    q = silu(x W_q), k = 1 - f, v = x W_v. The output is RMSNorm(q_t^T S_t) over all heads. The paper
    computes the gammas of all layers by one cumulative softmax over depth (``bounds_over_depth``). By
    default each layer has its own gamma = sigmoid(b), with the same initial value.
    """

    Options = HGRN2Options
    paper = "arXiv 2404.07904"
    formula = "G_t = alpha_t^T 1, alpha_t = gamma + (1 - gamma) sigmoid(x_t W_a), k_t = 1 - alpha_t"
    used_by = "HGRN-2"

    def __init__(self, options: HGRN2Options, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        # k_proj computes the logits of the forget gate f; the key is 1 - f
        self.build(heads, key_dim, value_dim, options.conv_size)
        self.lower_bound_logit = self.lower_bounds = None
        if options.lower_bound and options.bounds_over_depth:
            self.depth = sizes.mixing_idx
            self.lower_bounds = nn.Parameter(torch.empty(sizes.num_mixing_layers, heads * key_dim))
        elif options.lower_bound:
            self.lower_bound_logit = nn.Parameter(torch.empty(heads, key_dim))
        self.scale = options.scale
        eps = sizes.norm_eps if options.output_norm_eps is None else options.output_norm_eps
        self.norm = OutputNorm("layer", heads, value_dim, eps)

    no_weight_decay = ("lower_bound_logit", "lower_bounds")
    shared_by_stack = ("lower_bounds",)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return a bound per layer; a bound over depth; no bound with unequal dims and a convolution."""
        return [
            {"num_heads": 2},
            {"num_heads": 2, "bounds_over_depth": True},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, "conv_size": 4,
             "lower_bound": False, "scale": 0.5, "output_norm_eps": 1e-3},
        ]  # fmt: skip

    def init_parameters(self, std: float) -> None:
        """Set gamma to l / n in layer l of n, and to 0.01 in the first: at 0 it has no gradient."""
        if self.lower_bound_logit is not None:
            gamma = max(0.01, self.layer_idx / (self.sizes.num_hidden_layers or 1))
            init.constant_(self.lower_bound_logit, math.log(gamma / (1 - gamma)))
        if self.lower_bounds is not None:
            init.zeros_(self.lower_bounds)

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        q, f, v = self.project(x, cu_seqlens, cache)
        # log f and 1 - f from logsigmoids: 1 - sigmoid and log(sum) lose precision
        f = to_float32(f)
        log_f, k = F.logsigmoid(f), torch.sigmoid(-f)
        bound = self._log_bound()
        if bound is not None:
            log_gamma, log_rest = bound
            log_f = torch.logaddexp(log_gamma, log_rest + log_f)
            k = log_rest.exp() * k
        o = self.recur(F.silu(q), k.to(v.dtype), v, cu_seqlens, cache, log_decay=log_f)
        return self.o_proj(self.norm(o))

    def _log_bound(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return log gamma and log(1 - gamma), both (H, K); None if gamma is 0."""
        if self.lower_bound_logit is not None:
            b = to_float32(self.lower_bound_logit)
            return F.logsigmoid(b), F.logsigmoid(-b)
        if self.lower_bounds is None or self.depth == 0:
            return None
        share = to_float32(self.lower_bounds).log_softmax(0).unflatten(-1, (self.num_heads, -1))
        below, above = share[1 : self.depth + 1], share[self.depth + 1 :]
        rest = torch.cat([share[:1], above])
        return below.logsumexp(0), rest.logsumexp(0)
