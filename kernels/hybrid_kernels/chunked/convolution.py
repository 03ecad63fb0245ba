"""Short causal convolution as a few shifted multiply-adds over whole rows."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.packing import document_lengths
from hybrid_kernels.validation import state_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.causal_conv1d``; every document is preceded by its own state."""
    dtype = state_dtype(x, weight)
    history = weight.shape[1] - 1
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = x.new_zeros(rows, x.shape[2], history)
    past = initial_state.to(x.dtype).transpose(1, 2)
    if cu_seqlens is None:
        extended = torch.cat([past, x], dim=1)
        y = _taps(extended, weight, bias, activation, dtype)
        return y.to(x.dtype), extended[:, x.shape[1] :].transpose(1, 2)
    lengths = torch.tensor(document_lengths(cu_seqlens, x.shape[1]), device=x.device)
    shift = history * torch.arange(1, rows + 1, device=x.device)
    tokens = torch.arange(x.shape[1], device=x.device) + shift.repeat_interleave(lengths)
    ends = lengths.cumsum(0) + shift
    recent = torch.arange(-history, 0, device=x.device)
    before = ((ends - lengths)[:, None] + recent).flatten()
    extended = x.new_zeros(1, x.shape[1] + rows * history, x.shape[2])
    extended = extended.index_copy(1, tokens, x)
    extended = extended.index_copy(1, before, past.reshape(1, -1, x.shape[2]))
    y = _taps(extended, weight, bias, activation, dtype).to(x.dtype)
    after = (ends[:, None] + recent).flatten()
    final = extended[0, after].view(rows, history, x.shape[2]).transpose(1, 2)
    return y[:, tokens - history], final


def _taps(
    extended: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> Tensor:
    time = extended.shape[1] - weight.shape[1] + 1
    extended, weight = extended.to(dtype), weight.to(dtype)
    y = extended[:, :time] * weight[:, 0]
    for tap in range(1, weight.shape[1]):
        y = torch.addcmul(y, extended[:, tap : tap + time], weight[:, tap])
    if bias is not None:
        y = y + bias.to(dtype)
    return torch.nn.functional.silu(y) if activation == "silu" else y
