"""The arguments of each op, as one record that ``api.py`` makes and every backend is handed.

A field is the only declaration of an argument: the schemas of custom ops, the choice of a backend,
the check of devices and optional shapes, and the order of gradients follow from the fields. To add
an argument: a field here, its meaning in ``reference.py`` and ``api.py``, and the backends that
support it; the others say so in ``unsupported``.

Legend: B batch, T time, H heads, K key dim, V value dim, D channels, N documents or state size,
W filter width, R rows of the state (B, or documents).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record", bound="Arguments")

# How a field's type is spelt in the schema of a custom op.
_SCHEMA = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "int | None": "int?",
    "str | None": "str?",
    "bool": "bool",
}


def state_dtype(*inputs: Tensor) -> torch.dtype:
    """Return the dtype of the state: float64 if any input is float64, else float32."""
    for x in inputs:
        if x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def optional(shape: str) -> Any:
    """Declare an optional tensor of a shape in the letters of the legend."""
    return field(default=None, metadata={"shape": shape})


class Arguments:
    """Base of the records.

    Attributes:
        OP: name of the public op.
        NAMES: of all arguments, in order.
        TENSORS: of those that are tensors, or None.
        DIFFERENTIABLE: of those that have gradients.
        SHAPES: of the optional tensors, by name, in the letters of the legend.
        SCHEMA: arguments of a custom op that takes all of the record, in order.
        get: returns all values of a record, in order.
    """

    OP: ClassVar[str]
    NAMES: ClassVar[tuple[str, ...]]
    TENSORS: ClassVar[tuple[str, ...]]
    DIFFERENTIABLE: ClassVar[tuple[str, ...]]
    SHAPES: ClassVar[dict[str, str]]
    SCHEMA: ClassVar[str]
    get: ClassVar[Callable[[Any], tuple]]

    # What all records have.
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def first(self) -> Tensor:
        """The first argument, a sequence (B, T, ...)."""
        return getattr(self, self.NAMES[0])

    @property
    def time(self) -> int:
        """T."""
        return self.first.shape[1]

    def values(self) -> tuple:
        """Return all arguments, in order."""
        return tuple([getattr(self, name) for name in self.NAMES])

    def floating(self) -> dict[str, Tensor]:
        """Return the tensors that have gradients and are given, by name."""
        found = [(name, getattr(self, name)) for name in self.DIFFERENTIABLE]
        return {name: x for name, x in found if x is not None}

    def wants_gradient(self) -> bool:
        """Whether a backward pass may follow."""
        if not torch.is_grad_enabled():
            return False
        return any(x.requires_grad for x in self.floating().values())

    def replace(self: Record, **changes: Any) -> Record:
        """Return the record with other values of some fields."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]


def record(cls: type[Record]) -> type[Record]:
    """Make a dataclass of a record and derive its tables from its fields."""
    cls = dataclass(eq=False)(cls)
    found = fields(cls)  # pyright: ignore[reportArgumentType]
    cls.NAMES = tuple(f.name for f in found)
    cls.TENSORS = tuple(f.name for f in found if str(f.type).startswith("Tensor"))
    cls.DIFFERENTIABLE = tuple(name for name in cls.TENSORS if name != "cu_seqlens")
    cls.SHAPES = {f.name: f.metadata["shape"] for f in found if "shape" in f.metadata}
    cls.SCHEMA = ", ".join(f"{_SCHEMA[str(f.type)]} {f.name}" for f in found)
    cls.get = attrgetter(*cls.NAMES)
    return cls


@record
class LinearAttention(Arguments):
    """Arguments of ``linear_attention``, which documents them."""

    OP: ClassVar[str] = "linear_attention"

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    value_log_decay: Tensor | None = optional("(B, T, H, V)")
    beta: Tensor | None = optional("(B, T, H)")
    bonus: Tensor | None = optional("(H, K)")
    write_scale: Tensor | None = optional("(B, T, H)")
    initial_state: Tensor | None = optional("(R, H, K, V)")
    cu_seqlens: Tensor | None = None
    scale: float = 1.0
    chunk_size: int | None = None

    @property
    def heads(self) -> int:
        """H."""
        return max(self.q.shape[2], self.k.shape[2], self.v.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the state, and to compute in."""
        return state_dtype(self.q, self.k, self.v)


@record
class SelectiveScan(Arguments):
    """Arguments of ``selective_scan``, which documents them."""

    OP: ClassVar[str] = "selective_scan"

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = optional("(D,)")
    initial_state: Tensor | None = optional("(R, D, N)")
    cu_seqlens: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the state, and to compute in."""
        return state_dtype(self.u, self.delta, self.A, self.B, self.C)


@record
class CausalConv1d(Arguments):
    """Arguments of ``causal_conv1d``, which documents them."""

    OP: ClassVar[str] = "causal_conv1d"

    x: Tensor
    weight: Tensor
    bias: Tensor | None = optional("(D,)")
    initial_state: Tensor | None = optional("(R, D, W-1)")
    cu_seqlens: Tensor | None = None
    activation: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype to compute in."""
        return state_dtype(self.x, self.weight)
