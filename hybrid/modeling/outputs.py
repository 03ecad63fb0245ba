"""What a hybrid language model returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class HybridOutput(CausalLMOutputWithPast):
    """As any causal language model's, and what training and speculative decoding ask for.

    Attributes:
        router_logits: (B * T, E) of each router, under `output_router_logits=True`.
        aux_loss: what the balance options of the experts add to the loss, in training.
        mtp_loss: the mean loss of the multi-token prediction modules, before its weight, in training.
        last_hidden_state: (B, T, D), what the head reads, under `output_last_hidden_state=True`.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None
    mtp_loss: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
