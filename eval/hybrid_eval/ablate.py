"""Knock-outs: set the outputs of token mixers to zero at inference.

The output of a knocked-out branch is zero; residual stream and feed-forwards are unchanged. The
cache is unchanged as well, so that prefill and decode still agree.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

_NAMES = (
    *("self_attn", "self_attention", "linear_attn", "attention", "attn", "mamba", "mixer"),
    *("temporal_block", "conv", "short_conv", "recurrent"),
)
_LISTS = ("layers", "h", "blocks")
_FULL = ("full_attention", "attention")
_LOCAL = ("sliding_attention", "chunked_attention")
_STATES = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "linear")
# words in the names of classes with a state, and of classes with keys
_STATE_WORDS = re.compile(
    "linear|mamba|ssm|lightning|delta|retention|rwkv|recurrent|lstm|lru|hyena|conv|gla", re.I
)
_KEY_WORDS = re.compile("softmax|attention|attn", re.I)
_NOT_MIXERS = re.compile("mlp|moe|expert|feedforward|ffn", re.I)

Kind = Literal["attention", "linear"]


@dataclass(frozen=True)
class Branch:
    """One token mixer.

    Attributes:
        layer: index of its layer.
        name: name of its class.
        kind: "attention" for softmax over the keys of earlier tokens, "linear" for a state
            (recurrence, convolution).
        local: whether it attends only to a window or a chunk.
        module: the module.
    """

    layer: int
    name: str
    kind: Kind
    local: bool
    module: torch.nn.Module


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [
        (name.rpartition(".")[2], module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    # a list of experts or branches can have the length of the stack
    lists.sort(key=lambda pair: pair[0] not in _LISTS)
    if lists:
        return lists[0][1]
    raise ValueError(f"{type(model).__name__}: expected a list of {depth} layers, got none")


def _kind(name: str, module: torch.nn.Module, layer_type: str | None) -> tuple[Kind, bool]:
    """Return the kind of a branch, and whether its reach is bounded.

    The attribute ``attends`` of a module ("full", "local" or "") has priority. The layer type of
    transformers describes the cache of a layer, not a branch: softmax attention with a short
    convolution, and softmax in parallel with a recurrence, are both "hybrid". It is used only if it
    is unambiguous and the layer has one branch.
    """
    attends = getattr(module, "attends", None)
    if isinstance(attends, str):
        return ("attention" if attends else "linear"), attends == "local"
    layer_type = getattr(module, "layer_type", layer_type)
    if layer_type in _FULL or layer_type in _LOCAL:
        return "attention", layer_type in _LOCAL
    if layer_type in _STATES:
        return "linear", False
    words = type(module).__name__
    if _STATE_WORDS.search(words):
        return "linear", False
    if _KEY_WORDS.search(words) or "att" in name:
        return "attention", False
    return "linear", False


def _mixers(layer: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    found: list[tuple[str, torch.nn.Module]] = []
    for name in _NAMES:
        module = getattr(layer, name, None)
        if not isinstance(module, torch.nn.Module):
            continue
        parallel = getattr(module, "branches", None)
        if isinstance(parallel, torch.nn.ModuleList):
            found += [(name, branch) for branch in parallel]
        # stacks of single-purpose layers also call a feed-forward ``mixer``
        elif not _NOT_MIXERS.search(type(module).__name__):
            found.append((name, module))
    return found


def branches(model: torch.nn.Module) -> list[Branch]:
    """Return every token mixer of a model, layer by layer.

    Raises:
        ValueError: the model has no list of layers, or no mixer with a known name.
    """
    types = getattr(model.config, "layer_types", None) or []
    found = []
    for number, layer in enumerate(_layers(model)):
        own = _mixers(layer)
        layer_type = types[number] if number < len(types) and len(own) == 1 else None
        for name, module in own:
            kind, local = _kind(name, module, layer_type)
            found.append(Branch(number, type(module).__name__, kind, local, module))
    if not found:
        raise ValueError(
            f"{type(model).__name__}: expected layers with one of {', '.join(_NAMES)}, got none"
        )
    return found


def describe(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the branches as JSON values; empty if they are not known."""
    try:
        found = branches(model)
    except (ValueError, AttributeError):
        return []
    return [{"layer": b.layer, "name": b.name, "kind": b.kind, "local": b.local} for b in found]


def select(model: torch.nn.Module, what: str) -> list[Branch]:
    """Return the branches selected by ``attention``, ``linear`` or layer numbers (``0,3``).

    Raises:
        ValueError: another value, a layer that does not exist, or no branch of that kind.
    """
    every = branches(model)
    if what in ("attention", "linear"):
        chosen = [branch for branch in every if branch.kind == what]
        if not chosen:
            there = ", ".join(sorted({branch.name for branch in every}))
            raise ValueError(f"no {what} branch to knock out in this model; it has {there}")
        return _alone(chosen, every)
    words = what.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
        raise ValueError(f"ablate takes attention, linear or layers such as 0,3; got {what!r}")
    wanted = {int(word) for word in words}
    absent = wanted - {branch.layer for branch in every}
    if absent:
        raise ValueError(
            f"no token mixer in layer {min(absent)}; layers are 0 to {every[-1].layer}"
        )
    return _alone([branch for branch in every if branch.layer in wanted], every)


def _alone(chosen: list[Branch], every: list[Branch]) -> list[Branch]:
    """Refuse a module that other layers share, since they would be set to zero as well."""
    gone = {branch.layer for branch in chosen}
    for branch in chosen:
        others = {b.layer for b in every if b.module is branch.module} - gone
        if others:
            raise ValueError(
                f"layer {branch.layer} and layer {min(others)} are one and the same "
                f"{branch.name}; knock out both or neither"
            )
    return chosen


def _zero(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


@contextmanager
def ablated(model: torch.nn.Module, what: str | None) -> Iterator[list[Branch]]:
    """Set the outputs of the selected branches to zero in a context; None for no change."""
    with ExitStack() as stack:
        chosen = [] if what is None else select(model, what)
        for module in {id(branch.module): branch.module for branch in chosen}.values():
            stack.callback(module.register_forward_hook(_zero).remove)
        yield chosen
