"""The arguments of each op, as one record that ``api.py`` makes and every backend is handed.

A field is the only declaration of an argument. Schemas of custom ops, the names and the order of
gradients, the checks of optional tensors, and what a backend without the argument does follow from
the fields. To add an argument: a field here, its meaning in ``reference.py`` and ``api.py``, and
the backends that support it.

Shapes: B batch, T time, H heads, K key dim, V value dim, D channels, N documents or state size,
W filter width, R rows of the state (B, or the number of documents).
"""

from __future__ import annotations

from collections import namedtuple
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
}


def state_dtype(*inputs: Tensor) -> torch.dtype:
    """Return the dtype of the state: float64 if any input is float64, else float32."""
    for x in inputs:
        if x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def optional(
    shape: str,
    excludes: tuple[str, ...] = (),
    reason: str = "",
    fold: Callable[[Any], Any] | None = None,
    requires: tuple[str, ...] = (),
) -> Any:
    """Declare an optional tensor.

    Args:
        shape: in the letters of the legend.
        excludes: names of the arguments that it cannot be combined with.
        reason: why, appended to the error.
        fold: from a record to an equivalent one without this argument, for backends that do not
            take it.
        requires: names of the optional tensors that must be given with it.
    """
    metadata = {"shape": shape, "excludes": excludes, "reason": reason, "fold": fold}
    metadata["requires"] = requires
    return field(default=None, metadata=metadata)


class Arguments:
    """Base of the records.

    Attributes:
        OP: name of the public op.
        NAMES: names of all arguments, in order; tensors come first.
        TENSORS: names of the arguments that are tensors or None.
        DIFFERENTIABLE: names of the tensors that have gradients.
        OPTIONAL: metadata of the optional tensors (``optional``), by name.
        SCHEMA: arguments of a custom op that takes the record, in order.
        Gradients: named tuple with one gradient, or None, for each of ``DIFFERENTIABLE``.
        get: returns all values of a record, in order.
    """

    OP: ClassVar[str]
    NAMES: ClassVar[tuple[str, ...]]
    TENSORS: ClassVar[tuple[str, ...]]
    DIFFERENTIABLE: ClassVar[tuple[str, ...]]
    OPTIONAL: ClassVar[dict[str, Any]]
    SCHEMA: ClassVar[str]
    Gradients: ClassVar[Callable[..., Any]]
    get: ClassVar[Callable[[Any], tuple]]

    # Fields that all records have.
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

    @property
    def rows(self) -> int:
        """R, the number of states."""
        return self.first.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def floating(self) -> dict[str, Tensor]:
        """Return the given tensors that have gradients, by name."""
        values = [(name, getattr(self, name)) for name in self.DIFFERENTIABLE]
        return {name: x for name, x in values if x is not None}

    def requires_grad(self) -> list[bool]:
        """Return, for each of ``DIFFERENTIABLE``, whether autograd tracks it."""
        if not torch.is_grad_enabled():
            return [False] * len(self.DIFFERENTIABLE)
        values = [getattr(self, name) for name in self.DIFFERENTIABLE]
        return [x is not None and x.requires_grad for x in values]

    def needs_backward(self) -> bool:
        """Whether a backward pass may follow."""
        return any(self.requires_grad())

    def to(self: Record, dtype: torch.dtype) -> Record:
        """Return the record with all floating tensors in one dtype."""
        return self.replace(**{name: x.to(dtype) for name, x in self.floating().items()})

    def replace(self: Record, **changes: Any) -> Record:
        """Return the record with other values of some fields."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def to_fold(self, native: tuple[str, ...]) -> list[str]:
        """Return the names of the given arguments that a backend does not take but can do without.

        Args:
            native: names of the arguments with a ``fold`` that it does take.
        """
        foldable = [n for n, declared in self.OPTIONAL.items() if declared["fold"]]
        return [n for n in foldable if n not in native and getattr(self, n) is not None]

    def fold(self: Record, native: tuple[str, ...]) -> Record:
        """Return an equivalent record without those arguments."""
        a = self
        for name in self.to_fold(native):
            a = a.OPTIONAL[name]["fold"](a)
        return a


def record(cls: type[Record]) -> type[Record]:
    """Make a dataclass of a record and derive its tables from its fields."""
    cls = dataclass(eq=False)(cls)
    declared = fields(cls)  # pyright: ignore[reportArgumentType]
    cls.NAMES = tuple(f.name for f in declared)
    cls.TENSORS = tuple(f.name for f in declared if str(f.type).startswith("Tensor"))
    assert cls.NAMES[: len(cls.TENSORS)] == cls.TENSORS
    cls.DIFFERENTIABLE = tuple(name for name in cls.TENSORS if name != "cu_seqlens")
    cls.OPTIONAL = {f.name: f.metadata for f in declared if "shape" in f.metadata}
    cls.SCHEMA = ", ".join(f"{_SCHEMA[str(f.type)]} {f.name}" for f in declared)
    names = cls.DIFFERENTIABLE
    cls.Gradients = namedtuple(f"{cls.__name__}Gradients", names, defaults=[None] * len(names))
    cls.get = attrgetter(*cls.NAMES)
    return cls


def scaled_values(a: LinearAttention) -> LinearAttention:
    """Return the record with the values multiplied by ``write_scale``, and without it."""
    v, write_scale = a.v, a.write_scale
    assert write_scale is not None
    if v.shape[2] != a.heads:
        v = v.repeat_interleave(a.heads // v.shape[2], dim=2)
    return a.replace(v=(v * write_scale.unsqueeze(-1)).to(v.dtype), write_scale=None)


@record
class LinearAttention(Arguments):
    """Arguments of ``linear_attention``, which documents them."""

    OP: ClassVar[str] = "linear_attention"

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    value_log_decay: Tensor | None = optional("(B, T, H, V)", excludes=("beta", "bonus"))
    beta: Tensor | None = optional("(B, T, H)")
    bonus: Tensor | None = optional("(H, K)", excludes=("beta",))
    write_scale: Tensor | None = optional(
        "(B, T, H)", excludes=("beta",), reason=", which has its part there", fold=scaled_values
    )
    erase_key: Tensor | None = optional(
        "(B, T, H, K)",
        excludes=("beta", "value_log_decay", "bonus", "write_scale"),
        requires=("erase_query",),
    )
    erase_query: Tensor | None = optional("(B, T, H, K)", requires=("erase_key",))
    initial_state: Tensor | None = optional("(R, H, K, V)")
    cu_seqlens: Tensor | None = None
    scale: float = 1.0
    chunk_size: int | None = None

    @property
    def heads(self) -> int:
        """H."""
        return max(self.q.shape[2], self.k.shape[2], self.v.shape[2])

    @property
    def erases(self) -> bool:
        """Whether what a token writes depends on the state: the delta rule, or erase keys."""
        return self.beta is not None or self.erase_key is not None

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
