"""Multi-token prediction: modules that predict further ahead (DeepSeek-V3, arXiv 2412.19437, 2.2).

The k-th of n modules combines what is known of position i at the depth before it with the token k
further on, and predicts the token after that, with the embedding and the head of the main model:

    h^k = TRM_k(M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h^{k-1}_i)])    p(t_{i+k+1}) = head(norm_k(h^k_i))

h^0 is the output of the main stack. In training the mean of the modules' losses is added with a weight.
At inference they are left out, or draft tokens that the main model then checks all at once:
`generate(..., use_mtp=True)`, see `hybrid.modeling.speculative`.

As in the weights that DeepSeek, Qwen, Ling and Nemotron have published, each module has a final norm of
its own, the embedding stands before the hidden state in M_k, h^0 is taken behind the main stack's norm,
and a module hands on h^k behind its own (so do SGLang and Megatron-LM; vLLM hands on DeepSeek's before
it). `hybrid.convert` reads their modules, and writes them back.

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

# Builds a stack without embeddings from a config: `HybridModel`, which cannot be imported here.
BuildStack = Callable[..., nn.Module]


class MTPConfig(HybridConfig):
    """The config of one module's layers: that of the model, with another layout."""


def module_config(config: HybridConfig) -> MTPConfig:
    """What a module's layers are built from.

    `mtp_layout` names them; by default they are of the kind of the stack's last layer, and for a
    stack of mixers and feed-forwards in layers of their own, its last mixer and the feed-forward
    behind it. A layout of mixers alone takes the last layer's feed-forward.
    """
    last = config.layers[-1]
    layout, ffn = config.mtp_layout, last.ffn or ""
    if layout is None:
        mixers = next(layer.mixers for layer in reversed(config.layers) if layer.mixers)
        layout = str(Layer(mixers)) if last.mixers else f"{Layer(mixers)}{last.ffn}"
    # a class of its own: transformers carries a change of back-end over to parts whose class differs
    made = config.changed(
        layout=layout, ffn="-" if parse(layout).names_ffn else ffn, num_hidden_layers=None
    )
    made.__class__ = MTPConfig
    made.num_hidden_layers = len(made.stack)
    if not any(hasattr(part.options, "num_experts") for part in made.stack.feed_forwards.values()):
        made._experts_implementation_internal = None  # the model's, which a stack without refuses
    return made  # type: ignore[return-value]


class MTPModule(nn.Module):
    """One depth: (h^{k-1}_i, Emb(t_{i+k})) -> h^k_i."""

    def __init__(self, config: MTPConfig, stack: BuildStack) -> None:
        super().__init__()
        self.embedding_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.hidden_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.projection = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.stack: Any = stack(config, embed=False)

    def forward(self, hidden: torch.Tensor, embeddings: torch.Tensor, **kwargs: Any) -> Any:
        """(B, T, D) twice -> the output of `HybridModel.forward`, which takes the other arguments."""
        both = [self.embedding_norm(embeddings), self.hidden_norm(hidden)]
        x = self.projection(torch.cat(both, dim=-1))
        return self.stack(inputs_embeds=x, losses_follow=True, **kwargs)


class MultiTokenPrediction(nn.Module):
    """All modules of a model.

    Attributes:
        drafted, accepted: tokens that the modules have proposed, and the main model has taken, in the
            latest `generate(..., use_mtp=True)`.
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
        """The mean over depths of the loss at each.

        Args:
            hidden, embeddings: (B, T, D), outputs of the main stack and inputs of it.
            targets: (B, T), what the main model is to predict at each position, -100 for nothing.
            score: hidden states and targets -> their loss.
            attention_mask, position_ids: as the main stack was given. Where positions do not
                go on by one, a document ends, and nothing beyond it is predicted from before it.
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
    """A loss, and the outputs of each depth's layers."""

    loss: torch.Tensor
    outputs: list[Any]


def ahead(x: torch.Tensor, k: int, fill: float) -> torch.Tensor:
    """x (B, T, ...) moved k steps to the front of time; `fill` where nothing is left."""
    pad = [0, 0] * (x.ndim - 2) + [0, k]
    return F.pad(x[:, k:], pad, value=fill) if k <= x.shape[1] else torch.full_like(x, fill)


def _targets_ahead(
    targets: torch.Tensor, k: int, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Targets k further on, and none from beyond the end of a document."""
    found = ahead(targets, k, IGNORED)
    if position_ids is None:
        return found
    steps = ahead(position_ids, 1, 0) - position_ids == 1
    # from t to the target at t + k + 1 each step stays inside the document
    inside = torch.stack([ahead(steps, step, False) for step in range(k + 1)]).all(dim=0)
    return torch.where(inside.expand_as(found), found, IGNORED)
