"""Layers that share weights: one block at several depths, with optional adapters per depth.

Every layer is a separate module with its own cache slots. The parameters of one block are tied, as a
head is tied to its embedding. All parameters are shared except low-rank adapters on named projections
and a projection of the block's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import nn
from transformers import initialization as init

from hybrid.config.block_options import SharedOptions
from hybrid.config.spec import StackSpec
from hybrid.mixers.base import Mixer

# Projections with the same input, whose adapters share A, like the adapter of a fused projection.
ONE_INPUT = ("gate_proj", "up_proj")


def narrow_output(mixer: Mixer, hidden_size: int) -> None:
    """Replace the output projection of a mixer with a wider input, so that it writes D channels."""
    wide = cast(nn.Linear, mixer.o_proj)
    mixer.o_proj = nn.Linear(wide.in_features, hidden_size, bias=wide.bias is not None)


class AdaptedLinear(nn.Linear):
    """Linear with a low-rank adapter, x W^T + b + x A^T B^T (LoRA, arXiv 2106.09685, eq. 3).

    B is initialised to zero, so that a new depth initially equals the block.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias)
        self.lora_a = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, linear.out_features, bias=False)

    def init_parameters(self, std: float) -> None:
        """B at zero; the rest is initialised as any Linear is."""
        init.zeros_(self.lora_b.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., D_in) to (..., D_out)."""
        return super().forward(input) + self.lora_b(self.lora_a(input))


def adapt(
    symbols: Iterable[str], parts: Iterable[nn.Module | None], options: SharedOptions
) -> None:
    """Add an adapter to each projection in ``options.lora_targets``.

    Args:
        symbols: symbols of the layer, for error messages.
        parts: mixer and feed-forward of the layer, or None.
        options: options with targets and rank.

    Raises:
        ValueError: a target is not a projection of the layer.
    """
    parts, rank = [part for part in parts if part is not None], options.lora_rank
    assert rank is not None
    for name in options.lora_targets:
        parents = [part for part in parts if isinstance(getattr(part, name, None), nn.Linear)]
        if not parents:
            layer = "".join(symbols)
            known = sorted({n for part in parts for n in projections(part)})
            raise ValueError(
                f"shared.{layer}.lora_targets: expected projections of {layer!r}, got {name!r}; try"
                f" {', '.join(known)}"
            )
        for parent in parents:
            setattr(parent, name, AdaptedLinear(getattr(parent, name), rank))


def projections(part: nn.Module) -> list[str]:
    """Return the names of the Linear modules directly in a mixer or feed-forward."""
    return [name for name, child in part.named_children() if isinstance(child, nn.Linear)]


def tied_weights(stack: StackSpec, layers: nn.ModuleList) -> dict[str, str]:
    """Return the tied parameters of ``layers``: name -> name of the parameter it is tied to."""
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
    """Yield the parameters of a layer's mixers shared by the whole stack, and their shapes."""
    for prefix, module in layer.named_modules():
        for name in getattr(module, "shared_by_stack", ()):
            parameter = getattr(module, name)
            if parameter is not None:
                yield f"{prefix}.{name}", parameter.shape


def _names(layer: nn.Module, own: bool) -> Iterator[str]:
    """Yield the names of parameters that are not shared (``own``), or of those that are."""
    for name, _ in layer.named_parameters(remove_duplicate=False):
        is_own = ".lora_" in name or name.startswith("depth_projection.")
        if is_own == own:
            yield name
