"""Thin adapters to kernels of other packages, used only by name.

=================  ============================  =================================================
backend            covers                        limits
=================  ============================  =================================================
``fla``            every form but the decay      gates must be finite; a bonus needs the decay
                   over values                   over keys; the delta rule without decay takes no
                                                 float32
``mamba_ssm``      ``selective_scan``            no initial state, no packed documents; the final
                                                 state carries no gradient
``causal_conv1d``  ``causal_conv1d``             W from 2 to 4, D a multiple of 8, no packed
                                                 documents
=================  ============================  =================================================

They need a GPU and have not been run on one. Tests without a GPU: the kernels of
flash-linear-attention 0.6 are run in triton's interpreter, forward and backward, and held against
the reference. mamba-ssm 2.2 and causal-conv1d 1.5 do not install without CUDA: doubles with their
signatures, checks of dtypes and layouts included, stand in for them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.arguments import Arguments, CausalConv1d, LinearAttention, SelectiveScan

CONV_WIDTHS = (2, 3, 4)
CONV_CHANNELS = 8


def unsupported(arguments: Arguments) -> str | None:
    """Return why these inputs cannot be taken, or None."""
    if any(x.dtype == torch.float64 for x in arguments.floating().values()):
        return "it does not compute in float64"
    if arguments.first.shape[1] == 0:
        return "it does not take an empty sequence"
    if isinstance(arguments, LinearAttention):
        return _unsupported_by_fla(arguments)
    if arguments.cu_seqlens is not None:
        return "it does not take packed documents (cu_seqlens)"
    if isinstance(arguments, SelectiveScan):
        return None if arguments.initial_state is None else "it does not take an initial state"
    assert isinstance(arguments, CausalConv1d)
    channels, width = arguments.weight.shape
    if width not in CONV_WIDTHS:
        return f"its filters are 2 to 4 wide, got {width}"
    if channels % CONV_CHANNELS:
        return f"its channels are a multiple of {CONV_CHANNELS}, got {channels}"
    return None


def _unsupported_by_fla(a: LinearAttention) -> str | None:
    if not a.q.dtype == a.k.dtype == a.v.dtype:
        return f"it takes q, k and v of one dtype, got {a.q.dtype}, {a.k.dtype} and {a.v.dtype}"
    if a.erase_key is not None:
        return "it has no adapter for erase_key and erase_query"
    if a.beta is not None and a.log_decay is None and a.q.dtype == torch.float32:
        return "its delta rule without decay does not take float32"
    if a.bonus is not None and (a.log_decay is None or a.log_decay.dim() != 4):
        return "its kernel with a bonus needs log_decay of shape (B, T, H, K)"
    if a.value_log_decay is not None:
        return "it has no kernel for a decay over values (value_log_decay)"
    if a.chunk_size is not None:
        return "its chunk size cannot be chosen"
    return None


def linear_attention(a: LinearAttention) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.linear_attention`` with flash-linear-attention's kernels.

    Chunked ones, or, for one token without gradients, those that its models decode with.
    """
    log_decay, initial_state, cu_seqlens = a.log_decay, a.initial_state, a.cu_seqlens
    q, k, v = (x.repeat_interleave(a.heads // x.shape[2], dim=2) for x in (a.q, a.k, a.v))
    if log_decay is not None and log_decay.dim() == 1:
        # Their own argument for a fixed decay has no gradient.
        log_decay = log_decay.expand(*q.shape[:3])
    options: dict[str, Any] = {
        "scale": a.scale,
        "initial_state": None if initial_state is None else initial_state.float(),
        "output_final_state": True,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(q.device, torch.int64),
    }
    name, gates = _their_form(log_decay, a.beta, a.bonus)
    one = q.shape[1] == 1 and cu_seqlens is None and not a.needs_backward()
    if one and name == "gla":
        gates = {"gk": log_decay}
    run = getattr(
        importlib.import_module(f"fla.ops.{name}"),
        f"fused_recurrent_{name}" if one else f"chunk_{name}",
    )
    return run(q, k, v, **gates, **options)


def _their_form(
    log_decay: Tensor | None, beta: Tensor | None, bonus: Tensor | None
) -> tuple[str, dict[str, Tensor | None]]:
    """Return fla's name for a form, and its names for what comes with q, k and v."""
    vector = log_decay is not None and log_decay.dim() == 4
    if bonus is not None:
        return "rwkv6", {"w": log_decay, "u": bonus}
    if beta is None:
        return "gla" if vector else "simple_gla", {"g": log_decay}
    if log_decay is None:
        return "delta_rule", {"beta": beta}
    return "kda" if vector else "gated_delta_rule", {"g": log_decay, "beta": beta}


def selective_scan(a: SelectiveScan) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.selective_scan`` with mamba-ssm's kernel."""
    from mamba_ssm.ops.selective_scan_interface import (  # pyright: ignore[reportMissingImports]
        selective_scan_fn,
    )

    # Sequences of one dtype there, time innermost; parameters in float32.
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (a.u, a.delta, a.B, a.C)))
    u_, delta_, B_, C_ = (
        x.to(dtype).transpose(1, 2).contiguous() for x in (a.u, a.delta, a.B, a.C)
    )
    skip = None if a.D is None else a.D.float()
    y, state = selective_scan_fn(u_, delta_, a.A.float(), B_, C_, skip, return_last_state=True)
    # The kernel returns no gradient of the state: detach it rather than return a wrong one.
    return y.transpose(1, 2).to(a.u.dtype), state.detach()


def causal_conv1d(a: CausalConv1d) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.causal_conv1d`` with the kernel of the package of that name."""
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

    x, weight, bias, initial_state = a.x, a.weight, a.bias, a.initial_state
    history = weight.shape[1] - 1
    past = x.new_zeros(x.shape[0], history, x.shape[2])
    if initial_state is not None:
        past = initial_state.to(x.dtype).transpose(1, 2).contiguous()
    # Channels are innermost in memory there, last but one in shape.
    y = causal_conv1d_fn(
        x.contiguous().transpose(1, 2),
        weight,
        None if bias is None else bias.to(weight.dtype),
        initial_states=None if initial_state is None else past.transpose(1, 2),
        activation=a.activation,
    )
    inputs = torch.cat([past, x], dim=1)
    return y.transpose(1, 2), inputs[:, inputs.shape[1] - history :].transpose(1, 2)
