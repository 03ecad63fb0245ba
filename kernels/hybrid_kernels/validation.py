"""Every check on a public op's arguments, made once; implementations may assume them all.

Only shapes, dtypes and devices are looked at here, never values, so that the checks cost nothing
on a GPU and trace under ``torch.compile``. The values of ``cu_seqlens`` are checked where they are
read (``packing.documents``).
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 256
ACTIVATIONS = ("silu",)


def state_dtype(*inputs: Tensor) -> torch.dtype:
    """Return the dtype of the state: float64 if any input is float64, else float32."""
    for x in inputs:
        if x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def check_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    write_scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> None:
    """Raise a ValueError that names the first argument of ``linear_attention`` that is wrong."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be (B, T, heads, dim), got shape {_shape(x)}")
    if q.shape[:2] != k.shape[:2] or q.shape[:2] != v.shape[:2]:
        raise ValueError(
            "q, k and v must agree in batch and time, got "
            f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in key dim, got q {_shape(q)}, k {_shape(k)}")
    for name, size in (("key dim", q.shape[3]), ("value dim", v.shape[3])):
        if not 1 <= size <= MAX_DIM:
            raise ValueError(f"{name} must be between 1 and {MAX_DIM}, got {size}")
    batch, time = q.shape[:2]
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[2] == 0 or heads % x.shape[2]:
            raise ValueError(
                f"the heads of {name} must divide the largest head count, "
                f"got {x.shape[2]} and {heads}"
            )
    token = (batch, time, heads)
    if log_decay is not None:
        _floating("log_decay", log_decay)
        allowed = ((heads,), token, (*token, q.shape[3]))
        # One by one: a compiler whose sizes are symbols does not find them with `in`.
        if not any(log_decay.shape == shape for shape in allowed):
            raise ValueError(
                "log_decay must be (H,), (B, T, H) or (B, T, H, K), that is "
                f"{' or '.join(str(s) for s in allowed)}, got {_shape(log_decay)}"
            )
    _optional("value_log_decay", value_log_decay, (*token, v.shape[3]), "(B, T, H, V)")
    _optional("beta", beta, token, "(B, T, H)")
    _optional("bonus", bonus, (heads, q.shape[3]), "(H, K)")
    _optional("write_scale", write_scale, token, "(B, T, H)")
    if beta is not None and write_scale is not None:
        raise ValueError(
            "write_scale is for the additive form, it cannot go with beta, which has its part there"
        )
    if beta is not None and value_log_decay is not None:
        raise ValueError("value_log_decay is for the additive form, it cannot go with beta")
    if beta is not None and bonus is not None:
        raise ValueError("bonus is for the additive form, it cannot go with beta")
    if bonus is not None and value_log_decay is not None:
        raise ValueError("bonus cannot go with value_log_decay")
    if chunk_size is not None and (chunk_size < 16 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size must be a power of two and at least 16, got {chunk_size}")
    rows = _documents(cu_seqlens, batch)
    state = (rows, heads, q.shape[3], v.shape[3])
    _optional("initial_state", initial_state, state, "(B or N, H, K, V)")
    _same_device(
        ("q", q),
        ("k", k),
        ("v", v),
        ("log_decay", log_decay),
        ("value_log_decay", value_log_decay),
        ("beta", beta),
        ("bonus", bonus),
        ("write_scale", write_scale),
        ("initial_state", initial_state),
    )


def wrong_scale(scale: object) -> ValueError:
    """Return what to raise for a ``scale`` that ``float`` refuses.

    Made only where that failed: the checks above are for arguments that a decode loop repeats in one
    form, and a scale may differ at each step.
    """
    return ValueError(f"scale must be a number or None, got {type(scale).__name__} {scale!r}")


def check_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> None:
    """Raise a ValueError that names the first argument of ``causal_conv1d`` that is wrong."""
    _floating("x", x)
    _floating("weight", weight)
    if x.dim() != 3:
        raise ValueError(f"x must be (B, T, D), got shape {_shape(x)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(
            f"weight must be (D, W) with D = {x.shape[2]} and W >= 1, got {_shape(weight)}"
        )
    _optional("bias", bias, (x.shape[2],), "(D,)")
    if activation is not None and activation not in ACTIVATIONS:
        near = difflib.get_close_matches(str(activation), ACTIVATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"activation must be None or 'silu', got {activation!r}{hint}")
    rows = _documents(cu_seqlens, x.shape[0])
    state = (rows, x.shape[2], weight.shape[1] - 1)
    _optional("initial_state", initial_state, state, "(B or N, D, W-1)")
    _same_device(("x", x), ("weight", weight), ("bias", bias), ("initial_state", initial_state))


def check_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise a ValueError that names the first argument of ``selective_scan`` that is wrong."""
    for name, x in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        _floating(name, x)
    if u.dim() != 3:
        raise ValueError(f"u must be (B, T, D), got shape {_shape(u)}")
    batch, time, channels = u.shape
    if A.dim() != 2 or A.shape[0] != channels or not 1 <= A.shape[1] <= MAX_DIM:
        raise ValueError(
            f"A must be (D, N) with D = {channels} and N from 1 to {MAX_DIM}, got {_shape(A)}"
        )
    size = A.shape[1]
    _optional("delta", delta, (batch, time, channels), "(B, T, D)")
    _optional("B", B, (batch, time, size), "(B, T, N)")
    _optional("C", C, (batch, time, size), "(B, T, N)")
    _optional("D", D, (channels,), "(D,)")
    rows = _documents(cu_seqlens, batch)
    _optional("initial_state", initial_state, (rows, channels, size), "(B or documents, D, N)")
    _same_device(
        ("u", u),
        ("delta", delta),
        ("A", A),
        ("B", B),
        ("C", C),
        ("D", D),
        ("initial_state", initial_state),
    )


def _documents(cu_seqlens: Tensor | None, batch: int) -> int:
    """Check the form of ``cu_seqlens``; return how many rows the state has."""
    if cu_seqlens is None:
        return batch
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens must be a one-dimensional int32 or int64 tensor, "
            f"got {cu_seqlens.dtype} of shape {_shape(cu_seqlens)}"
        )
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must hold at least two offsets, got {cu_seqlens.shape[0]}")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs the documents packed in a batch of 1, got B = {batch}")
    return cu_seqlens.shape[0] - 1


def _optional(name: str, x: Tensor | None, shape: tuple[int, ...], words: str) -> None:
    if x is None:
        return
    _floating(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {words} = {shape}, got {_shape(x)}")


def _floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")


def _same_device(*named: tuple[str, Tensor | None]) -> None:
    first_name, first = named[0]
    assert first is not None
    for name, x in named[1:]:
        if x is not None and x.device != first.device:
            raise ValueError(
                f"{name} is on {x.device} but {first_name} is on {first.device}; move one of them"
            )


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
