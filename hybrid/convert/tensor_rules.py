"""Weight maps: rules that convert a family's tensors to ours, and ours to theirs.

A rule names some of their tensors and some of ours, and lists the operations from the first to the
second. Each operation is a rearrangement. So reading and writing are exact inverses, and an
imported checkpoint is exported bit for bit. Sizes come from the shapes of our tensors, so few are
written down.

In names, ``{i}`` is the index of a layer and ``{e}`` the index of an expert (all of them, in
order).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Tensors = list[torch.Tensor]
Constant = Callable[[Any, int, int], torch.Tensor]
Shape = tuple[int, ...]


class Place(NamedTuple):
    """The context of a rule for its operations.

    Attributes:
        options: completed options of the layer's mixer or feed-forward, whichever the rule is
            restricted to; None for rules outside the layers.
        shapes: shapes of the tensors of ours that the rule creates.
    """

    options: Any
    shapes: tuple[Shape, ...]


class Operation(ABC):
    """One operation from their tensors to ours, and back."""

    @abstractmethod
    def read(self, tensors: Tensors, place: Place) -> Tensors:
        """Convert theirs to ours."""

    @abstractmethod
    def write(self, tensors: Tensors, place: Place) -> Tensors:
        """Convert ours to theirs."""


@dataclass(frozen=True)
class Squeeze(Operation):
    """Drop a dim of size 1: their Conv1d weights (C, 1, W) are (C, W) in ours."""

    dim: int = 1

    def read(self, tensors: Tensors, place: Place) -> Tensors:
        """(..., 1, ...) -> (..., ...)."""
        return [tensor.squeeze(self.dim) for tensor in tensors]

    def write(self, tensors: Tensors, place: Place) -> Tensors:
        """(..., ...) -> (..., 1, ...)."""
        return [tensor.unsqueeze(self.dim) for tensor in tensors]


@dataclass(frozen=True)
class Unsqueeze(Operation):
    """Add a dim of size 1."""

    dim: int = 0

    def read(self, tensors: Tensors, place: Place) -> Tensors:
        """(..., ...) -> (..., 1, ...)."""
        return [tensor.unsqueeze(self.dim) for tensor in tensors]

    def write(self, tensors: Tensors, place: Place) -> Tensors:
        """(..., 1, ...) -> (..., ...)."""
        return [tensor.squeeze(self.dim) for tensor in tensors]


@dataclass(frozen=True)
class Transpose(Operation):
    """Swap two dims, in each tensor."""

    first: int = -2
    second: int = -1

    def read(self, tensors: Tensors, place: Place) -> Tensors:
        """Swap the two dims."""
        return [tensor.transpose(self.first, self.second) for tensor in tensors]

    write = read


@dataclass(frozen=True)
class Reshape(Operation):
    """Reshape: their tensors have our elements in our order, in another shape.

    Attributes:
        theirs: options -> their shape, -1 for one dim.
    """

    theirs: Callable[[Any], Sequence[int]]

    def read(self, tensors: Tensors, place: Place) -> Tensors:
        """Reshape to our shapes."""
        return [t.reshape(shape) for t, shape in zip(tensors, place.shapes, strict=True)]

    def write(self, tensors: Tensors, place: Place) -> Tensors:
        """Reshape to their shapes."""
        return [tensor.reshape(*self.theirs(place.options)) for tensor in tensors]


@dataclass(frozen=True)
class Split(Operation):
    """Split their fused tensor into several of ours, consecutive along a dim.

    Attributes:
        dim: the dim.
        groups: options -> number of groups. The fused tensor has the first group's share of each of
            ours, then the second group's, and so on (Qwen3-Next's ``in_proj_qkvz``). Default: one
            group.
    """

    dim: int = 0
    groups: Callable[[Any], int] | None = None

    def _count(self, place: Place) -> int:
        return 1 if self.groups is None else self.groups(place.options)

    def read(self, tensors: Tensors, place: Place) -> Tensors:
        """Split by our sizes."""
        (fused,) = tensors
        count = self._count(place)
        sizes = [shape[self.dim] // count for shape in place.shapes]
        parts = fused.unflatten(self.dim, (count, -1)).split(sizes, dim=self.dim + 1)
        return [part.flatten(self.dim, self.dim + 1) for part in parts]

    def write(self, tensors: Tensors, place: Place) -> Tensors:
        """Concatenate."""
        count = self._count(place)
        parts = [tensor.unflatten(self.dim, (count, -1)) for tensor in tensors]
        return [torch.cat(parts, dim=self.dim + 1).flatten(self.dim, self.dim + 1)]


@dataclass(frozen=True)
class Fuse(Operation):
    """Concatenate several of their tensors along a dim into one of ours.

    Attributes:
        sizes: options -> size of each along the dim; default: equal parts.
        parts: number of parts, if ``sizes`` is not set.
        dim: the dim.
        loose: files can split it at other positions; only the total size must fit.
    """

    sizes: Callable[[Any], Sequence[int]] | None = None
    parts: int = 2
    dim: int = 0
    loose: bool = False

    def read(self, tensors: Tensors, place: Place) -> Tensors:
        """Concatenate."""
        return [torch.cat(tensors, dim=self.dim)]

    def write(self, tensors: Tensors, place: Place) -> Tensors:
        """Split."""
        (fused,) = tensors
        if self.sizes is None:
            return list(fused.chunk(self.parts, dim=self.dim))
        return list(fused.split(list(self.sizes(place.options)), dim=self.dim))


@dataclass(frozen=True)
class Reorder(Operation):
    """Reorder blocks along a dim: x, B, C of Mamba-2's convolution are C, B, x in ours.

    Attributes:
        sizes: options -> sizes of THEIR blocks, in their order.
        order: indices of our blocks in their order.
        dim: the dim.
    """

    sizes: Callable[[Any], Sequence[int]]
    order: tuple[int, ...]
    dim: int = 0

    def read(self, tensors: Tensors, place: Place) -> Tensors:
        """Convert to our order."""
        sizes = list(self.sizes(place.options))
        return [self._pick(tensor, sizes, list(self.order)) for tensor in tensors]

    def write(self, tensors: Tensors, place: Place) -> Tensors:
        """Convert to their order."""
        theirs = self.sizes(place.options)
        sizes = [theirs[number] for number in self.order]
        inverse = [self.order.index(number) for number in range(len(sizes))]
        return [self._pick(tensor, sizes, inverse) for tensor in tensors]

    def _pick(self, tensor: torch.Tensor, sizes: list[int], order: list[int]) -> torch.Tensor:
        blocks = tensor.split(sizes, dim=self.dim)
        return torch.cat([blocks[number] for number in order], dim=self.dim)


@dataclass(frozen=True)
class Deinterleave(Operation):
    """Deinterleave rows along a dim: g0 u0 g1 u1 becomes g0 g1 u0 u1 (gpt-oss).

    Attributes:
        parts: number of interleaved parts.
        dim: the dim.
    """

    parts: int = 2
    dim: int = -1

    def read(self, tensors: Tensors, place: Place) -> Tensors:
        """Deinterleave to blocks."""
        return [self._turn(tensor, (-1, self.parts)) for tensor in tensors]

    def write(self, tensors: Tensors, place: Place) -> Tensors:
        """Interleave."""
        return [self._turn(tensor, (self.parts, -1)) for tensor in tensors]

    def _turn(self, tensor: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
        dim = self.dim % tensor.ndim
        return tensor.unflatten(dim, sizes).transpose(dim, dim + 1).flatten(dim, dim + 1)


@dataclass(frozen=True)
class DeinterleaveTail(Operation):
    """Deinterleave the last rows of each group from pairs to two halves (DeepSeek's RoPE).

    Attributes:
        groups: options -> number of groups along dim 0.
        kept: options -> number of rows of a group before those.
    """

    groups: Callable[[Any], int]
    kept: Callable[[Any], int]

    def read(self, tensors: Tensors, place: Place) -> Tensors:
        """Deinterleave to halves."""
        return [self._turn(tensor, place, Deinterleave(dim=1).read) for tensor in tensors]

    def write(self, tensors: Tensors, place: Place) -> Tensors:
        """Interleave to pairs."""
        return [self._turn(tensor, place, Deinterleave(dim=1).write) for tensor in tensors]

    def _turn(
        self, tensor: torch.Tensor, place: Place, turn: Callable[[Tensors, Place], Tensors]
    ) -> torch.Tensor:
        grouped = tensor.unflatten(0, (self.groups(place.options), -1))
        kept = self.kept(place.options)
        return torch.cat([grouped[:, :kept], *turn([grouped[:, kept:]], place)], dim=1).flatten(
            0, 1
        )


@dataclass(frozen=True)
class Stack(Operation):
    """Stack one matrix per expert: all ``{e}`` of each name, then concatenated along dim 1.

    ``gate {e}``, ``up {e}``, each (I, D), become ``gate_up_proj`` (E, 2 I, D).

    Attributes:
        names: number of their names.
    """

    names: int = 1

    def read(self, tensors: Tensors, place: Place) -> Tensors:
        """Convert [name x expert] to one tensor."""
        experts = len(tensors) // self.names
        stacked = [
            torch.stack(tensors[start : start + experts])
            for start in range(0, len(tensors), experts)
        ]
        return [torch.cat(stacked, dim=1) if self.names > 1 else stacked[0]]

    def write(self, tensors: Tensors, place: Place) -> Tensors:
        """Convert one tensor to [name x expert]."""
        (stacked,) = tensors
        return [t for part in stacked.chunk(self.names, dim=1) for t in part.unbind(0)]


@dataclass(frozen=True)
class Rule:
    """Some of their tensors, some of ours, and the operations between them.

    Attributes:
        theirs: one or several names.
        ours: one or several names; default: the same names. None if ``constant`` is set.
        operations: from theirs to ours, in order.
        mixer: only in layers with this symbol of the family (``S``); several as a string (``SN``).
        ffn: only in layers with this feed-forward (``E``).
        constant: (options, layer, layers) -> their tensor, which follows from the config; it is
            written and not read.
        when: only if this predicate holds for the options of that mixer or feed-forward.
        joined: only in layers merged with the layer before in theirs (True), or not (False); None
            for both. See ``Family.joins_next``.
        whole: their name for our tensor, if some files store it as it is in ours.

    A rule applies if our model has the tensors that it creates: a rule for a bias needs no
    condition.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...] = ()
    operations: tuple[Operation, ...] = ()
    mixer: str = ""
    ffn: str = ""
    constant: Constant | None = None
    when: Callable[[Any], bool] | None = None
    joined: bool | None = None
    whole: str = ""

    @property
    def their_names(self) -> tuple[str, ...]:
        """Return their names as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    @property
    def our_names(self) -> tuple[str, ...]:
        """Return our names as a tuple."""
        if self.constant is not None:
            return ()
        ours = self.ours or self.theirs
        return (ours,) if isinstance(ours, str) else ours

    @property
    def per_layer(self) -> bool:
        """Return whether the rule applies to each layer."""
        return any("{i}" in name for name in self.our_names or self.their_names)


def rule(
    theirs: str | Sequence[str],
    ours: str | Sequence[str] = (),
    *operations: Operation,
    mixer: str = "",
    ffn: str = "",
    when: Callable[[Any], bool] | None = None,
    whole: str = "",
) -> Rule:
    """Return a ``Rule`` with operations as positional arguments."""
    names = [n if isinstance(n, str) else tuple(n) for n in (theirs, ours)]
    return Rule(names[0], names[1], operations, mixer, ffn, when=when, whole=whole)


def constant(theirs: str, make: Constant, mixer: str = "", ffn: str = "") -> Rule:
    """Return a rule for a tensor of theirs that follows from the config, such as a buffer of decays."""
    return Rule(theirs, (), (), mixer, ffn, make)


def renames(
    theirs: str, ours: str, names: dict[str, str] | Sequence[str], mixer: str = "", ffn: str = ""
) -> tuple[Rule, ...]:
    """Return rules for several tensors of one module, weights and biases: prefixes, and names below
    them.

    Args:
        theirs, ours: prefixes that end in a dot.
        names: their name -> ours, without ``.weight`` and ``.bias``; a sequence if they are equal.
        mixer, ffn: see ``Rule``.
    """
    pairs = names if isinstance(names, dict) else {name: name for name in names}
    return tuple(
        Rule(f"{theirs}{their}.{kind}", f"{ours}{our}.{kind}", (), mixer, ffn)
        for their, our in pairs.items()
        for kind in ("weight", "bias")
    )
