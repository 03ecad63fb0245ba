"""Outputs of a hybrid language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class HybridOutput(CausalLMOutputWithPast):
    """Output of a causal language model, with additional fields for training and speculative decoding.

    Attributes:
        router_logits: (B * T, E) of each router, with ``output_router_logits=True``.
        aux_loss: balance losses of the experts, in training.
        mtp_loss: mean loss of the multi-token prediction modules, before its weight, in training.
        last_hidden_state: (B, T, D), input of the head, with ``output_last_hidden_state=True``.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None
    mtp_loss: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
