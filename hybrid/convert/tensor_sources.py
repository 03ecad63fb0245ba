"""Sources of tensors: a checkpoint, memory, or either under other names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch

from hybrid.convert.checkpoint import Spec


class TensorSource(Protocol):
    """Tensors by name: a checkpoint folder, or a state dict."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Return shape and dtype of every tensor."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        ...


class Held:
    """A state dict as a ``TensorSource``."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.specs: Mapping[str, Spec] = {
            name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor as a copy."""
        return self.tensors[name].detach().cpu().clone()


class Respelt:
    """A source under other names: prefixes or parts of names with their replacements.

    Raises:
        ValueError: two tensors have the same new name.
    """

    def __init__(self, source: TensorSource, spellings: Sequence[tuple[str, str]]) -> None:
        self.source = source
        self.names: dict[str, str] = {}
        for name in source.specs:
            here = name
            for found, wanted in spellings:
                here = here.replace(found, wanted)
            if here in self.names:
                raise ValueError(
                    f"{self.names[here]} and {name} of the checkpoint are one tensor here"
                )
            self.names[here] = name
        self.specs: Mapping[str, Spec] = {n: source.specs[old] for n, old in self.names.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        return self.source.read(self.names[name])


class Without:
    """A source without some of its tensors."""

    def __init__(self, source: TensorSource, names: Collection[str]) -> None:
        self.source = source
        self.specs: Mapping[str, Spec] = {
            name: spec for name, spec in source.specs.items() if name not in names
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        return self.source.read(name)
