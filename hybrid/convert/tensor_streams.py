"""Execute a tensor plan tensor by tensor, and compute the resulting shapes and dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hybrid.convert.checkpoint import Spec, some
from hybrid.convert.tensor_plan import Step
from hybrid.convert.tensor_rules import Tensors
from hybrid.convert.tensor_sources import TensorSource


def our_specs(
    planned: Sequence[Step], source: TensorSource, dtype: torch.dtype | None
) -> dict[str, Spec]:
    """Return the specs of our tensors; ``dtype`` is for all floating-point ones, None keeps theirs."""
    return {
        name: Spec(shape, _cast(_dtype_of(step.theirs, source), dtype))
        for step in planned
        if step.is_read
        for name, shape in zip(step.ours, step.place.shapes, strict=True)
    }


def their_specs(planned: Sequence[Step], source: TensorSource) -> dict[str, Spec]:
    """Return the specs of their tensors, from ours in ``source``."""
    specs: dict[str, Spec] = {}
    for step in planned:
        dtype = _dtype_of(step.sources, source) if step.constant is None else step.constant.dtype
        shapes = step.their_shapes()
        specs |= {name: Spec(s, dtype) for name, s in zip(step.theirs, shapes, strict=True)}
    return specs


def _dtype_of(names: Sequence[str], source: TensorSource) -> torch.dtype:
    """Return the common dtype of tensors of one step."""
    kinds = {source.specs[name].dtype for name in names}
    if len(kinds) > 1:
        listed = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ValueError(
            f"{some(list(names))}: belong together and are of different types, {listed}"
        )
    return kinds.pop()


def _cast(found: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and found.is_floating_point else found


def read_steps(
    planned: Sequence[Step], source: TensorSource, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield our tensors, step by step."""
    for step in planned:
        if not step.is_read:
            continue
        for name, tensor in zip(step.ours, step.read(_all(step.theirs, source)), strict=True):
            yield name, tensor.contiguous().to(_cast(tensor.dtype, dtype))


def write_steps(
    planned: Sequence[Step], source: TensorSource
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield their tensors, step by step."""
    for step in planned:
        yield from zip(step.theirs, step.write(_all(step.sources, source)), strict=True)


def _all(names: Sequence[str], source: TensorSource) -> Tensors:
    return [source.read(name) for name in names]
