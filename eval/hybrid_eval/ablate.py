"""Knock out token mixers at inference: what does a model lose without them?

The output of a knocked-out branch is zero; residual stream and feed-forwards stay. The cache is
kept as it is, so that prefill and decoding still agree.
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
# words in the names of classes that keep a state, and of those that keep keys
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
        layer: its layer.
        name: of its class.
        kind: "attention" if it weighs the keys of earlier tokens by softmax, "linear" if what it
            knows of them is a state (recurrence, convolution).
        local: whether it attends to a window or a chunk only.
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
    # a list of experts or branches may be as long as the stack
    lists.sort(key=lambda pair: pair[0] not in _LISTS)
    if lists:
        return lists[0][1]
    raise ValueError(f"{type(model).__name__}: no list of {depth} layers found to knock out")


def _kind(name: str, module: torch.nn.Module, layer_type: str | None) -> tuple[Kind, bool]:
    """Return what a branch does, and whether its reach is bounded.

    A module that says so itself (``attends``: "full", "local" or "") is believed. The layer type of
    transformers tells what a layer caches, which is not what a branch does: softmax attention with
    a short convolution, and softmax beside a recurrence, are both "hybrid". It decides only where
    it is of one meaning and the layer has one branch.
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
        # stacks of single-purpose layers call a feed-forward `mixer`, too
        elif not _NOT_MIXERS.search(type(module).__name__):
            found.append((name, module))
    return found


def branches(model: torch.nn.Module) -> list[Branch]:
    """Return every token mixer of a model, layer by layer.

    Raises:
        ValueError: no list of layers, or no mixer of a known name in any.
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
        raise ValueError(f"{type(model).__name__}: no layer has any of {', '.join(_NAMES)}")
    return found


def describe(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the branches in JSON's terms; none where they cannot be told."""
    try:
        found = branches(model)
    except (ValueError, AttributeError):
        return []
    return [{"layer": b.layer, "name": b.name, "kind": b.kind, "local": b.local} for b in found]


def select(model: torch.nn.Module, what: str) -> list[Branch]:
    """Return the branches that ``attention``, ``linear`` or layer numbers (``0,3``) name.

    Raises:
        ValueError: none of the three, a layer that is not there, or no branch of that kind.
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
    """Refuse a module that other layers use as well: zeroing it would zero them, too."""
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
    """Zero the chosen branches while the context lasts; None changes nothing."""
    with ExitStack() as stack:
        chosen = [] if what is None else select(model, what)
        for module in {id(branch.module): branch.module for branch in chosen}.values():
            stack.callback(module.register_forward_hook(_zero).remove)
        yield chosen
