"""Classification of whole sequences, such as by reward models, and of tokens.

Shapes: B batch, T time, D model dim, C labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from hybrid.config.hybrid_config import HybridConfig
from hybrid.modeling.model import MODEL_ARGUMENTS
from hybrid.modeling.pretrained import HybridPreTrainedModel
from hybrid.modeling.stack import HybridModel
from hybrid.nn.arguments import CACHE, check_arguments, pick_cache


class HybridForSequenceClassification(HybridPreTrainedModel):
    """Model with a linear head on the last token of each sequence: ids (B, T) -> logits (B, C)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = HybridModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Run ``HybridModel.forward``, and the head on the last token of each row.

        The last token is the last one with a nonzero ``attention_mask``. Without a mask, it is the last
        one whose id is not ``pad_token_id``, as in transformers' own models.

        Args:
            labels: (B,) int64 classes; (B,) or (B, C) floats for regression or multi-label problems.

        Returns:
            Logits (B, C), and the loss if there are labels.

        Raises:
            ValueError: several rows, with neither a mask nor a ``pad_token_id``.
        """
        check_arguments(type(self).__name__, type(self).forward, kwargs, MODEL_ARGUMENTS)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=pick_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{name: kwargs[name] for name in kwargs if name != "shift_labels"},
        )
        hidden = outputs.last_hidden_state
        last = self._last_tokens(hidden, input_ids, attention_mask)
        rows = torch.arange(len(hidden), device=hidden.device)
        logits = self.score(hidden[rows, last.to(hidden.device)])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    def _last_tokens(
        self, hidden: torch.Tensor, ids: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the index (B,) of the last token of each row."""
        batch, time = hidden.shape[:2]
        pad = self.config.pad_token_id
        if mask is not None and mask.ndim == 2:
            real = mask[:, -time:] != 0
        elif ids is not None and pad is not None:
            real = ids != pad
        elif batch == 1:
            real = torch.ones(batch, time, dtype=torch.bool)
        else:
            raise ValueError(
                f"attention_mask: expected (B, T) with 0 at padding for a batch of {batch} rows, got"
                " neither a mask nor pad_token_id and input_ids; try attention_mask, or pad_token_id in"
                " the config"
            )
        return (torch.arange(time, device=real.device) * real).argmax(-1)


class HybridForTokenClassification(GenericForTokenClassification, HybridPreTrainedModel):
    """Model with a linear head on every token: ids (B, T) -> logits (B, T, C)."""
