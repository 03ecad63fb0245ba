"""Multi-token prediction: modules that predict later tokens (DeepSeek-V3, arXiv 2412.19437, 2.2).

The k-th of n modules combines the previous depth's hidden state of position i with token i + k, and
predicts token i + k + 1. It uses the embedding and the head of the main model:

    h^k = TRM_k(M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h^{k-1}_i)])    p(t_{i+k+1}) = head(norm_k(h^k_i))

h^0 is the output of the main stack. In training, the mean loss of the modules is added with a weight. At
inference, the modules are either skipped, or they draft tokens that the main model verifies in one
forward: ``generate(..., use_mtp=True)``, see ``hybrid.modeling.speculative``.

As in the published weights of DeepSeek, Qwen, Ling and Nemotron, each module has its own final norm, the
embedding comes before the hidden state in M_k, h^0 is taken after the norm of the main stack, and a
module passes on h^k after its own norm. (SGLang and Megatron-LM do the same; vLLM passes on DeepSeek's
h^k before the norm.) ``hybrid.convert`` reads and writes these modules.

Shapes: B batch, T time, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.config.hybrid_config import HybridConfig
from hybrid.layout import Layer, parse
from hybrid.modeling.losses import IGNORED
from hybrid.nn.norms import build_norm

# Builds a stack without embeddings from a config: `HybridModel`, passed in to avoid an import cycle.
BuildStack = Callable[..., nn.Module]


class MTPConfig(HybridConfig):
    """Config of the layers of one module: the model's config with another layout."""


def module_config(config: HybridConfig) -> MTPConfig:
    """Return the config of a module's layers.

    ``mtp_layout`` sets the layers. By default they are like the last layer of the stack. If the stack
    has mixers and feed-forwards in separate layers, they are the last mixer and the feed-forward after
    it. A layout without feed-forwards uses the feed-forward of the last layer.
    """
    last = config.layers[-1]
    layout, ffn = config.mtp_layout, last.ffn or ""
    if layout is None:
        mixers = next(layer.mixers for layer in reversed(config.layers) if layer.mixers)
        layout = str(Layer(mixers)) if last.mixers else f"{Layer(mixers)}{last.ffn}"
    # a separate class: transformers passes a change of backend on to parts whose config class differs
    derived = config.changed(
        layout=layout, ffn="-" if parse(layout).names_ffn else ffn, num_hidden_layers=None
    )
    derived.__class__ = MTPConfig
    derived.num_hidden_layers = len(derived.stack)
    parts = derived.stack.feed_forwards.values()
    if not any(hasattr(part.options, "num_experts") for part in parts):
        # a stack without experts rejects the experts_implementation of the model
        derived._experts_implementation_internal = None
    return derived  # type: ignore[return-value]


class MTPModule(nn.Module):
    """Multi-token prediction module of one depth: (h^{k-1}_i, Emb(t_{i+k})) -> h^k_i."""

    def __init__(self, config: MTPConfig, stack: BuildStack) -> None:
        super().__init__()
        self.embedding_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.hidden_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.projection = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.stack: Any = stack(config, embed=False)

    def forward(self, hidden: torch.Tensor, embeddings: torch.Tensor, **kwargs: Any) -> Any:
        """Run the module on two tensors (B, T, D); other arguments as in ``HybridModel.forward``."""
        both = [self.embedding_norm(embeddings), self.hidden_norm(hidden)]
        x = self.projection(torch.cat(both, dim=-1))
        return self.stack(inputs_embeds=x, losses_follow=True, **kwargs)


class MultiTokenPrediction(nn.Module):
    """All multi-token prediction modules of a model.

    Attributes:
        drafted, accepted: numbers of tokens drafted by the modules and accepted by the main model in the
            latest ``generate(..., use_mtp=True)``.
    """

    def __init__(self, config: HybridConfig, stack: BuildStack) -> None:
        super().__init__()
        part = module_config(config)
        self.depths = nn.ModuleList(MTPModule(part, stack) for _ in range(config.num_mtp_layers))
        self.drafted = self.accepted = 0

    def loss(
        self,
        hidden: torch.Tensor,
        embeddings: torch.Tensor,
        targets: torch.Tensor,
        score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MTPLoss:
        """Compute the mean loss over depths.

        Args:
            hidden, embeddings: (B, T, D), outputs and inputs of the main stack.
            targets: (B, T), targets of the main model at each position, -100 for none.
            score: function (hidden states, targets) -> loss.
            attention_mask, position_ids: as in the main stack. If a position does not follow the
                previous one, a document ends. No token is predicted from another document.
        """
        losses, outputs = [], []
        for k, module in enumerate(self.depths, start=1):
            out = module(
                hidden,
                ahead(embeddings, k, 0.0),
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                **kwargs,
            )
            hidden = out.last_hidden_state
            losses.append(score(hidden, _targets_ahead(targets, k, position_ids)))
            outputs.append(out)
        return MTPLoss(torch.stack(losses).mean(), outputs)


@dataclass(frozen=True)
class MTPLoss:
    """Loss of multi-token prediction, and the outputs of each depth's stack."""

    loss: torch.Tensor
    outputs: list[Any]


def ahead(x: torch.Tensor, k: int, fill: float) -> torch.Tensor:
    """Shift x (B, T, ...) by k steps, so that position t has x_{t+k}; ``fill`` at the end."""
    pad = [0, 0] * (x.ndim - 2) + [0, k]
    return F.pad(x[:, k:], pad, value=fill) if k <= x.shape[1] else torch.full_like(x, fill)


def _targets_ahead(
    targets: torch.Tensor, k: int, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Return targets k steps ahead, without those beyond the end of a document."""
    shifted = ahead(targets, k, IGNORED)
    if position_ids is None:
        return shifted
    steps = ahead(position_ids, 1, 0) - position_ids == 1
    # from t to the target at t + k + 1 each step stays inside the document
    inside = torch.stack([ahead(steps, step, False) for step in range(k + 1)]).all(dim=0)
    return torch.where(inside.expand_as(shifted), shifted, IGNORED)
