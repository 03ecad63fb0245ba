"""Layers that share their weights: one block at several depths, each with something of its own.

Every layer is a module with its own place in the cache. Layers of one block hold the same parameters:
they are tied, as a head is to its embedding. What a depth has to itself are low-rank adapters on named
projections and a projection of the block's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import nn

from hybrid.config.block_options import SharedOptions
from hybrid.config.spec import StackSpec
from hybrid.mixers.base import Mixer, residual_projection

# Adapters that read the same input and have one A, as those of a fused projection have.
ONE_INPUT = ("gate_proj", "up_proj")


def narrow_output(mixer: Mixer, hidden_size: int) -> None:
    """Make a mixer built for a wider input write D channels."""
    wide = cast(nn.Linear, mixer.o_proj)
    mixer.o_proj = residual_projection(wide.in_features, hidden_size, wide.bias is not None)


class AdaptedLinear(nn.Linear):
    """x W^T + b + x A^T B^T: a projection with an adapter of low rank (arXiv 2106.09685, eq. 3).

    B starts at zero, so that a new depth of a block begins as the block.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias)
        if hasattr(linear, "is_residual_projection"):
            self.is_residual_projection = True
        self.lora_a = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, linear.out_features, bias=False)
        self.lora_b.starts_at_zero = True  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., D_in) -> (..., D_out)."""
        return super().forward(input) + self.lora_b(self.lora_a(input))


def adapt(
    symbols: Iterable[str], parts: Iterable[nn.Module | None], options: SharedOptions
) -> None:
    """Give the projections that `options.lora_targets` names an adapter each.

    Args:
        symbols: of the layer, for errors.
        parts: its mixer and its feed-forward.
        options: with targets and rank.

    Raises:
        ValueError: there is no projection of a name.
    """
    parts, rank = [part for part in parts if part is not None], options.lora_rank
    assert rank is not None
    for name in options.lora_targets:
        parents = [part for part in parts if isinstance(getattr(part, name, None), nn.Linear)]
        if not parents:
            layer = "".join(symbols)
            known = sorted({n for part in parts for n in projections(part)})
            raise ValueError(
                f"shared.{layer}.lora_targets: {layer!r} has no projection {name!r}; it has"
                f" {', '.join(known)}"
            )
        for parent in parents:
            setattr(parent, name, AdaptedLinear(getattr(parent, name), rank))


def projections(part: nn.Module) -> list[str]:
    """Names of the Linear modules that a mixer or a feed-forward has itself."""
    return [name for name, child in part.named_children() if isinstance(child, nn.Linear)]


def tied_weights(stack: StackSpec, layers: nn.ModuleList) -> dict[str, str]:
    """Parameter -> the one it is tied to, by name, for the stack `layers`."""
    tied = {}
    owners: dict[tuple[str, torch.Size], str] = {}
    for i, layer in enumerate(layers):
        for name, shape in _stack_wide(layer):
            path = f"layers.{i}.{name}"
            source = owners.setdefault((name.rpartition(".")[2], shape), path)
            if source != path:
                tied[path] = source
        source = stack[i].source
        for name in _names(layer, own=True):
            head, _, last = name.removesuffix(".lora_a.weight").rpartition(".")
            if name.endswith(".lora_a.weight") and last == ONE_INPUT[1]:
                first = f"{head}.{ONE_INPUT[0]}.lora_a.weight"
                if first in dict(layer.named_parameters(remove_duplicate=False)):
                    tied[f"layers.{i}.{name}"] = f"layers.{i}.{first}"
        if source != i:
            for name in _names(layer, own=False):
                tied[f"layers.{i}.{name}"] = f"layers.{source}.{name}"
    return tied


def _stack_wide(layer: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """Parameters of a layer's mixers that all layers of the stack share, and their shapes."""
    for prefix, module in layer.named_modules():
        for name in getattr(module, "shared_by_stack", ()):
            parameter = getattr(module, name)
            if parameter is not None:
                yield f"{prefix}.{name}", parameter.shape


def _names(layer: nn.Module, own: bool) -> Iterator[str]:
    """Parameters that a depth has to itself, or the others."""
    for name, _ in layer.named_parameters(remove_duplicate=False):
        is_own = ".lora_" in name or name.startswith("depth_projection.")
        if is_own == own:
            yield name
