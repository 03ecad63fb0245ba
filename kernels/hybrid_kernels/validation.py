"""Every check on a public op's arguments, made once; implementations may assume them all.

Only shapes, dtypes and devices are looked at here, never values, so that the checks cost nothing
on a GPU and trace under ``torch.compile``. The values of ``cu_seqlens`` are checked where they are
read (``packing.documents``).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.arguments import (
    Arguments,
    CausalConv1d,
    LinearAttention,
    SelectiveScan,
)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 256
ACTIVATIONS = ("silu",)


def check(arguments: Arguments) -> None:
    """Raise a ValueError that names the first argument that is wrong."""
    _CHECKS[arguments.OP](arguments)


def _check_linear_attention(a: LinearAttention) -> None:
    q, k, v, log_decay = a.q, a.k, a.v, a.log_decay
    for name, x in (("q", q), ("k", k), ("v", v)):
        _floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected (B, T, heads, dim), got shape {_shape(x)}")
    if q.shape[:2] != k.shape[:2] or q.shape[:2] != v.shape[:2]:
        raise ValueError(
            "q, k, v: expected shapes that agree in batch and time, got "
            f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k: expected shapes that agree in key dim, got q {_shape(q)}, k {_shape(k)}"
        )
    for name, kind, size in (("q", "key dim", q.shape[3]), ("v", "value dim", v.shape[3])):
        if not 1 <= size <= MAX_DIM:
            raise ValueError(f"{name}: expected a {kind} between 1 and {MAX_DIM}, got {size}")
    batch, time = q.shape[:2]
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[2] == 0 or heads % x.shape[2]:
            raise ValueError(
                f"{name}: expected a number of heads that divides the largest of q, k and v, "
                f"{heads}, got {x.shape[2]}"
            )
    token = (batch, time, heads)
    if log_decay is not None:
        _floating("log_decay", log_decay)
        allowed = ((heads,), token, (*token, q.shape[3]))
        # One by one: a compiler whose sizes are symbols does not find them with `in`.
        if not any(log_decay.shape == shape for shape in allowed):
            raise ValueError(
                "log_decay: expected (H,), (B, T, H) or (B, T, H, K), that is "
                f"{' or '.join(str(s) for s in allowed)}, got {_shape(log_decay)}"
            )
    chunk_size = a.chunk_size
    if chunk_size is not None and (chunk_size < 16 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size: expected a power of two of at least 16, got {chunk_size}")
    letters = {"B": batch, "T": time, "H": heads, "K": q.shape[3], "V": v.shape[3]}
    _check_optional(a, letters)


def _check_causal_conv1d(a: CausalConv1d) -> None:
    x, weight, activation = a.x, a.weight, a.activation
    _floating("x", x)
    _floating("weight", weight)
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, T, D), got shape {_shape(x)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(
            f"weight: expected (D, W) with D = {x.shape[2]} and W >= 1, got {_shape(weight)}"
        )
    if activation is not None and activation not in ACTIVATIONS:
        near = difflib.get_close_matches(str(activation), ACTIVATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}{hint}")
    _check_optional(a, {"B": x.shape[0], "D": x.shape[2], "W-1": weight.shape[1] - 1})


def _check_selective_scan(a: SelectiveScan) -> None:
    u, delta, A, B, C = a.u, a.delta, a.A, a.B, a.C
    for name, x in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        _floating(name, x)
    if u.dim() != 3:
        raise ValueError(f"u: expected (B, T, D), got shape {_shape(u)}")
    batch, time, channels = u.shape
    if A.dim() != 2 or A.shape[0] != channels or not 1 <= A.shape[1] <= MAX_DIM:
        raise ValueError(
            f"A: expected (D, N) with D = {channels} and N from 1 to {MAX_DIM}, got {_shape(A)}"
        )
    size = A.shape[1]
    _shaped("delta", delta, (batch, time, channels), "(B, T, D)")
    _shaped("B", B, (batch, time, size), "(B, T, N)")
    _shaped("C", C, (batch, time, size), "(B, T, N)")
    _check_optional(a, {"B": batch, "D": channels, "N": size})


_CHECKS: dict[str, Callable[[Any], None]] = {
    LinearAttention.OP: _check_linear_attention,
    CausalConv1d.OP: _check_causal_conv1d,
    SelectiveScan.OP: _check_selective_scan,
}


def _check_optional(arguments: Arguments, letters: dict[str, int]) -> None:
    """Check the optional tensors against the shapes of their fields, and where all tensors are.

    Args:
        arguments: the record.
        letters: sizes by letter, B among them; R, the rows of the state, is found here.
    """
    letters = {**letters, "R": _documents(arguments.cu_seqlens, letters["B"])}
    for name, declared in arguments.OPTIONAL.items():
        x, symbols = getattr(arguments, name), declared["shape"]
        if x is None:
            continue
        for other in declared["excludes"]:
            if getattr(arguments, other) is not None:
                raise ValueError(
                    f"{name}: expected None beside {other}{declared['reason']}, got a tensor; "
                    "try without one of them"
                )
        for other in declared["requires"]:
            if getattr(arguments, other) is None:
                raise ValueError(
                    f"{other}: expected a tensor beside {name}, got None; "
                    "try both of them or neither"
                )
        shape = tuple(letters[letter] for letter in symbols.strip("(),").split(", "))
        _shaped(name, x, shape, symbols.replace("R,", "B or N,"))
    _same_device(*[(name, getattr(arguments, name)) for name in arguments.DIFFERENTIABLE])


def _documents(cu_seqlens: Tensor | None, batch: int) -> int:
    """Check the form of ``cu_seqlens``; return how many rows the state has."""
    if cu_seqlens is None:
        return batch
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens: expected a one-dimensional int32 or int64 tensor, "
            f"got {cu_seqlens.dtype} of shape {_shape(cu_seqlens)}"
        )
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected at least two offsets, got {cu_seqlens.shape[0]}")
    if batch != 1:
        raise ValueError(f"cu_seqlens: expected documents packed in a batch of 1, got B = {batch}")
    return cu_seqlens.shape[0] - 1


def _shaped(name: str, x: Tensor, shape: tuple[int, ...], symbols: str) -> None:
    _floating(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected {symbols} = {shape}, got {_shape(x)}")


def _floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}")


def _same_device(*named: tuple[str, Tensor | None]) -> None:
    first_name, first = named[0]
    assert first is not None
    for name, x in named[1:]:
        if x is not None and x.device != first.device:
            raise ValueError(
                f"{name}: expected the device of {first_name}, {first.device}, got {x.device}; "
                "try moving one of them"
            )


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
