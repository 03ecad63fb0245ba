"""Routers, which choose the experts of each token.

Shapes: N tokens, D model dim, E experts, k experts per token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from hybrid.ffn.moe_options import MoEOptions
from hybrid.mixers.parts import to_float32
from hybrid.nn.precision import Float32Buffers


class Router(nn.Module):
    """Router with one linear map to the scores of all experts, always in float32.

    Attributes:
        load: (E,) float32, tokens of each expert since the last optimizer step, in this process;
            None before the first forward. ``hybrid.ffn.balance`` updates and clears it. It is not
            a buffer, because ``DistributedDataParallel`` would overwrite it with that of the first
            process.
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
        """Route tokens x (N, D).

        The weights are the scores of the chosen experts. The bias of a ``BiasedRouter`` affects
        only the choice (arXiv 2412.19437, eq. 16).

        Returns:
            Logits (N, E) float32, weights (N, k) float32, and expert indices (N, k) int64.
        """
        with maybe_autocast(device_type=x.device.type, enabled=False):
            bias = None if self.bias is None else to_float32(self.bias)
            logits = F.linear(to_float32(x), to_float32(self.weight), bias)
        scores = self._scores(logits)
        indices = self.choose(scores.detach())
        weights = scores.gather(-1, indices)
        if self.options.normalize_weights:
            # All k sigmoid scores may underflow to 0.
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / (total + self.options.normalize_epsilon)
        return logits, weights * self.options.scaling_factor, indices

    def choices(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the k experts of each token, (N, k) int64, from logits (N, E)."""
        return self.choose(self._scores(logits.detach()))

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the k experts of each token, (N, k) int64, from scores (N, E).

        With groups, only experts of a token's best groups can be chosen (arXiv 2412.19437, section
        2.1.2).
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
        """Return scores normalised over the experts, (N, E), for balance losses, from logits (N, E)."""
        scores = self._scores(logits)
        if self.options.score_function == "softmax":
            return scores
        return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        if self.options.score_function == "softmax":
            return logits.softmax(dim=-1)
        return logits.sigmoid()

    def init_parameters(self, std: float) -> None:
        """Draw weights from a normal distribution; set the bias to 0."""
        init.normal_(self.weight, mean=0.0, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Return the sizes for ``repr``."""
        experts, d_model = self.weight.shape
        return f"{d_model}, experts={experts}, top_k={self.options.top_k}"


class BiasedRouter(Float32Buffers, Router):
    """Router whose choice is corrected by a bias per expert, a buffer saved in checkpoints.

    The bias stays in float32 when the model is cast, because steps of 0.001 would be rounded away
    in bfloat16.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ("score_correction_bias",)

    def __init__(self, options: MoEOptions, hidden_size: int) -> None:
        super().__init__(options, hidden_size)
        bias = torch.zeros(options.num_experts, dtype=torch.float32)
        self.score_correction_bias = nn.Buffer(bias)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """See ``Router.choose``; the bias is added to the scores."""
        return super().choose(scores + self.score_correction_bias)

    def init_parameters(self, std: float) -> None:
        """Initialise like ``Router``; set the correction bias to 0."""
        super().init_parameters(std)
        init.zeros_(self.score_correction_bias)


def build_router(options: MoEOptions, hidden_size: int) -> Router:
    """Return a router for these options."""
    kind = BiasedRouter if options.has_correction_bias else Router
    return kind(options, hidden_size)
