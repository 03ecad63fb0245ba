"""Thin adapters to other people's kernels, used only when asked for by name.

=================  ============================  =================================================
backend            covers                        limits
=================  ============================  =================================================
``fla``            every form but the decay      K and V as its kernels allow; gates must be finite;
                   over values                   a bonus needs the decay over keys
``mamba_ssm``      ``selective_scan``            no initial state, no packed documents; the final
                                                 state carries no gradient
``causal_conv1d``  ``causal_conv1d``             W from 2 to 4, no packed documents
=================  ============================  =================================================

They need a GPU and were written against the signatures and docstrings of flash-linear-attention
0.6, mamba-ssm 2.2 and causal-conv1d 1.5. None of them has been run from here: their kernels do not
run on a CPU, so neither these adapters nor those kernels are covered by our tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONV_WIDTHS = (2, 3, 4)


def unsupported(op: str, **arguments: Any) -> str | None:
    """Return why these inputs cannot be taken, or None."""
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in arguments.values()):
        return "it does not compute in float64"
    if op == "linear_attention":
        return _unsupported_by_fla(**arguments)
    if arguments.get("cu_seqlens") is not None:
        return "it does not take packed documents (cu_seqlens)"
    if op == "selective_scan" and arguments.get("initial_state") is not None:
        return "it does not take an initial state"
    if op == "causal_conv1d" and arguments["weight"].shape[1] not in CONV_WIDTHS:
        return f"its filters are 2 to 4 wide, got {arguments['weight'].shape[1]}"
    return None


def _unsupported_by_fla(
    *,
    q: Tensor,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    bonus: Tensor | None,
    chunk_size: int | None,
    **_: Any,
) -> str | None:
    if q.shape[1] == 0:
        return "it does not take an empty sequence"
    if value_log_decay is not None:
        return "it has no kernel for a decay over values (value_log_decay)"
    if bonus is not None and (log_decay is None or log_decay.dim() != 4):
        return "its kernel with a bonus needs log_decay of shape (B, T, H, K)"
    if chunk_size is not None:
        return "its chunk size cannot be chosen"
    return None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.linear_attention`` with flash-linear-attention's chunk kernels."""
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    q, k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k, v))
    if log_decay is not None and log_decay.dim() == 1:
        # Their own argument for a fixed decay has no gradient.
        log_decay = log_decay.expand(*q.shape[:3])
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": True,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.long(),
    }
    if bonus is not None:
        from fla.ops.rwkv6 import chunk_rwkv6  # pyright: ignore[reportMissingImports]

        return chunk_rwkv6(q, k, v, log_decay, bonus, **options)
    return _additive_or_delta(q, k, v, log_decay, beta, options)


def _additive_or_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    vector = log_decay is not None and log_decay.dim() == 4
    if beta is None:
        if vector:
            from fla.ops.gla import chunk_gla  # pyright: ignore[reportMissingImports]

            return chunk_gla(q, k, v, log_decay, **options)
        from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

        return chunk_simple_gla(q, k, v, log_decay, **options)
    if log_decay is None:
        from fla.ops.delta_rule import chunk_delta_rule  # pyright: ignore[reportMissingImports]

        return chunk_delta_rule(q, k, v, beta, **options)
    if vector:
        from fla.ops.kda import chunk_kda  # pyright: ignore[reportMissingImports]

        return chunk_kda(q, k, v, log_decay, beta, **options)
    from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
        chunk_gated_delta_rule,
    )

    return chunk_gated_delta_rule(q, k, v, log_decay, beta, **options)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.selective_scan`` with mamba-ssm's kernel."""
    from mamba_ssm.ops.selective_scan_interface import (  # pyright: ignore[reportMissingImports]
        selective_scan_fn,
    )

    rows = (x.transpose(1, 2).contiguous() for x in (u, delta))
    columns = (x.transpose(1, 2).contiguous() for x in (B, C))
    skip = None if D is None else D.float()
    y, state = selective_scan_fn(*rows, A.float(), *columns, skip, return_last_state=True)
    return y.transpose(1, 2), state


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.causal_conv1d`` with the kernel of the package of that name."""
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

    history = weight.shape[1] - 1
    if initial_state is None:
        past = x.new_zeros(x.shape[0], x.shape[2], history)
    else:
        past = initial_state.to(x.dtype)
    # Both must be channel-last in memory there.
    y = causal_conv1d_fn(
        x.contiguous().transpose(1, 2),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        initial_states=past.transpose(1, 2).contiguous().transpose(1, 2),
        activation=activation,
    )
    inputs = torch.cat([past, x.transpose(1, 2)], dim=2)
    return y.transpose(1, 2), inputs[..., inputs.shape[2] - history :]
