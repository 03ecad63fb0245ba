"""Which experts a token goes to.

Shapes: N tokens, D model dim, E experts, k experts of a token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from hybrid.ffn.moe_options import MoEOptions
from hybrid.mixers.parts import wide
from hybrid.nn.precision import Float32Buffers


class Router(nn.Module):
    """Scores of all experts from one linear map, in float32 whatever the model's dtype.

    Attributes:
        load: (E,) float32, tokens that each expert got since the last optimizer step, in this
            process; None before the first. `hybrid.ffn.balance` counts and clears it. No buffer:
            `DistributedDataParallel` would overwrite it with that of the first process.
    """

    bias: torch.Tensor | None

    def __init__(self, options: MoEOptions, hidden_size: int) -> None:
        super().__init__()
        self.options = options
        self.num_experts = options.num_experts
        self.weight = nn.Parameter(torch.empty(options.num_experts, hidden_size))
        bias = nn.Parameter(torch.empty(options.num_experts)) if options.router_bias else None
        self.register_parameter("bias", bias)
        self.load: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (N, D) -> logits (N, E), weights (N, k), both float32, and experts (N, k) int64.

        A token weighs its experts by their scores; the bias of a `BiasedRouter` only takes part in
        the choice (arXiv 2412.19437, eq. 16).
        """
        with maybe_autocast(device_type=x.device.type, enabled=False):
            bias = None if self.bias is None else wide(self.bias)
            logits = F.linear(wide(x), wide(self.weight), bias)
        scores = self._scores(logits)
        indices = self.choose(scores.detach())
        weights = scores.gather(-1, indices)
        if self.options.normalize_weights:
            # Sigmoid scores of all k may vanish together.
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / (total + self.options.normalize_epsilon)
        return logits, weights * self.options.scaling_factor, indices

    def choices(self, logits: torch.Tensor) -> torch.Tensor:
        """The k experts of each token by its logits (N, E), (N, k) int64."""
        return self.choose(self._scores(logits.detach()))

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The k experts of each token: scores (N, E) -> (N, k) int64.

        With groups, only experts of a token's best groups are eligible (arXiv 2412.19437, 2.1.2).
        """
        options = self.options
        if options.num_groups > 1:
            grouped = scores.unflatten(-1, (options.num_groups, -1))
            best = 1 if options.group_score == "max" else 2
            group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
            kept = group_scores.topk(options.top_k_groups, dim=-1, sorted=False).indices
            barred = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, False)
            scores = grouped.masked_fill(barred.unsqueeze(-1), float("-inf")).flatten(-2)
        return scores.topk(options.top_k, dim=-1, sorted=False).indices

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores that sum to one over the experts, (N, E) -> (N, E): what balance losses take."""
        scores = self._scores(logits)
        if self.options.score_function == "softmax":
            return scores
        return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        if self.options.score_function == "softmax":
            return logits.softmax(dim=-1)
        return logits.sigmoid()

    def init_parameters(self, std: float) -> None:
        """Normal weights, no bias."""
        init.normal_(self.weight, mean=0.0, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Sizes."""
        experts, d_model = self.weight.shape
        return f"{d_model}, experts={experts}, top_k={self.options.top_k}"


class BiasedRouter(Float32Buffers, Router):
    """A router whose choice is corrected by a bias per expert, a buffer saved in checkpoints.

    The bias stays in float32 when the model is cast: steps of 0.001 would round away in bfloat16.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ("score_correction_bias",)

    def __init__(self, options: MoEOptions, hidden_size: int) -> None:
        super().__init__(options, hidden_size)
        bias = torch.zeros(options.num_experts, dtype=torch.float32)
        self.score_correction_bias = nn.Buffer(bias)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """As `Router.choose`, after the bias is added."""
        return super().choose(scores + self.score_correction_bias)

    def init_parameters(self, std: float) -> None:
        """As `Router`, and a correction of zero."""
        super().init_parameters(std)
        init.zeros_(self.score_correction_bias)


def build_router(options: MoEOptions, hidden_size: int) -> Router:
    """The router that the options ask for."""
    kind = BiasedRouter if options.has_correction_bias else Router
    return kind(options, hidden_size)
