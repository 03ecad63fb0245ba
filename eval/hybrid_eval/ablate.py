"""Knock out token mixers at inference: what does a model lose without them?

The output of a knocked-out branch is zero; residual stream and feed-forwards stay. The cache is
kept as it is, so that prefill and decoding still agree.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_NAMES = ("self_attn", "linear_attn", "attention", "attn", "mamba", "mixer", "temporal_block")
_SOFTMAX_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "attention")


@dataclass(frozen=True)
class Branch:
    """One token mixer: its layer, its name in the model, and whether it is softmax attention."""

    layer: int
    name: str
    kind: str
    module: torch.nn.Module


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__}: no list of {depth} layers found to knock out")


def _kind(name: str, module: torch.nn.Module, layer_type: str | None, alone: bool) -> str:
    if alone and layer_type is not None:
        return "attention" if layer_type in _SOFTMAX_LAYERS else "linear"
    if "softmax" in type(module).__name__.lower():
        return "attention"
    return "attention" if name in ("self_attn", "attention", "attn") else "linear"


def branches(model: torch.nn.Module) -> list[Branch]:
    """Return every token mixer of a model, layer by layer.

    Raises:
        ValueError: no list of layers, or no mixer of a known name in any.
    """
    types = getattr(model.config, "layer_types", None) or []
    found = []
    for number, layer in enumerate(_layers(model)):
        own: list[tuple[str, torch.nn.Module]] = []
        for name in _NAMES:
            module = getattr(layer, name, None)
            if not isinstance(module, torch.nn.Module):
                continue
            parallel = getattr(module, "branches", None)
            own += [(name, m) for m in parallel] if parallel is not None else [(name, module)]
        layer_type = types[number] if number < len(types) else None
        for name, module in own:
            kind = _kind(name, module, layer_type, len(own) == 1)
            found.append(Branch(number, name, kind, module))
    if not found:
        raise ValueError(f"{type(model).__name__}: no layer has any of {', '.join(_NAMES)}")
    return found


def select(model: torch.nn.Module, what: str) -> list[Branch]:
    """Return the branches that ``attention``, ``linear`` or layer numbers (``0,3``) name.

    Raises:
        ValueError: none of the three, a layer that is not there, or no branch of that kind.
    """
    every = branches(model)
    if what in ("attention", "linear"):
        chosen = [branch for branch in every if branch.kind == what]
        if not chosen:
            raise ValueError(f"no {what} branch to knock out in this model")
        return chosen
    words = what.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise ValueError(f"ablate takes attention, linear or layers such as 0,3; got {what!r}")
    wanted = {int(word) for word in words}
    absent = wanted - {branch.layer for branch in every}
    if absent:
        raise ValueError(
            f"no token mixer in layer {min(absent)}; layers are 0 to {every[-1].layer}"
        )
    return [branch for branch in every if branch.layer in wanted]


def _zero(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


@contextmanager
def ablated(model: torch.nn.Module, what: str | None) -> Iterator[list[Branch]]:
    """Zero the chosen branches while the context lasts; None changes nothing."""
    with ExitStack() as stack:
        chosen = [] if what is None else select(model, what)
        for branch in chosen:
            stack.callback(branch.module.register_forward_hook(_zero).remove)
        yield chosen
