"""Our model in a family's view: blocks of mixers and a feed-forward, with their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.spec import BranchSpec, LayerSpec, MixerSpec
from hybrid.layout import Layer, parse_ffn
from hybrid.layout.shortest import shortest
from hybrid.layout.types import Layout
from hybrid.modeling.model import HybridForCausalLM
from hybrid.modeling.stack import HybridModel


class Part(NamedTuple):
    """One mixer or feed-forward.

    Attributes:
        name: its registered name.
        options: its completed options.
        letter: its symbol in the layout.
        around: its block options, as paths (see ``hybrid.config.block_options``).
    """

    name: str
    options: Any
    letter: str
    around: dict[str, Any]


class Block(NamedTuple):
    """One layer of a family: mixers, a feed-forward or both, and the indices of our layers."""

    mixers: tuple[Part, ...]
    ffn: Part | None
    mixer_layer: int
    ffn_layer: int


def on_meta(config: HybridConfig) -> HybridForCausalLM:
    """Build the model of a config without memory for its weights."""
    with torch.device("meta"):
        return HybridForCausalLM(config)


def fill(model: HybridForCausalLM, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load weights into a model on the meta device, and compute buffers that depend on the config."""
    for name, tensor in tensors:
        owner, leaf = name.rpartition(".")[::2]
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            module._parameters[leaf] = tensor
        else:
            module._buffers[leaf] = tensor
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        model._init_weights(module)  # skips modules marked as initialised
    for tensor in (*model.parameters(), *model.buffers()):
        assert not tensor.is_meta
        if hasattr(tensor, "_is_hf_initialized"):
            del tensor._is_hf_initialized


def blocks(model: HybridForCausalLM, literal: bool = False) -> list[Block]:
    """Return the stack of a model.

    A feed-forward joins the mixer before it, unless the family is literal.
    """
    return _blocks(model.model, literal)


def mtp_blocks(model: HybridForCausalLM, literal: bool = False) -> list[list[Block]]:
    """Return the layers of each multi-token prediction module in the same form."""
    modules: Any = () if model.mtp is None else model.mtp.depths
    return [_blocks(module.stack, literal) for module in modules]


def _blocks(stack: HybridModel, literal: bool) -> list[Block]:
    found: list[Block] = []
    for i, (layer, module) in enumerate(zip(stack.config.stack, stack.layers, strict=True)):
        mixers = tuple(_mixers(layer, module))
        if mixers:
            found.append(Block(mixers, None, i, i))
        if layer.ffn is not None and layer.ffn_branch is not None:
            symbol = layer.ffn.symbol
            around = _around(layer, symbol, layer.ffn_branch, layer.ffn_branch)
            ffn = Part(type(module.ffn).name, module.ffn.options, symbol, around)
            if not literal and found and found[-1].ffn is None and found[-1].mixers:
                found[-1] = found[-1]._replace(ffn=ffn, ffn_layer=i)
            else:
                found.append(Block((), ffn, i, i))
    return found


def _around(
    layer: LayerSpec, symbol: str, branch: BranchSpec, part: BranchSpec | MixerSpec
) -> dict[str, Any]:
    """Return norms, multipliers, canon layers and weight sharing of one branch, by config path."""
    shared = layer.shared
    return {
        f"norm_position.{symbol}": branch.norm_position,
        f"canon.{symbol}": layer.canon,
        f"residuals.{symbol}.input_multiplier": part.input_multiplier,
        f"residuals.{symbol}.output_multiplier": part.output_multiplier,
        f"residuals.{symbol}.skip_multiplier": branch.skip_multiplier,
        **({f"shared.{symbol}.{n}": _plain(v) for n, v in vars(shared).items()} if shared else {}),
    }


def _plain(value: Any) -> Any:
    """Names without their order."""
    return sorted(value) if isinstance(value, list | tuple) else value


def _mixers(layer: LayerSpec, module: Any) -> Iterator[Part]:
    branches = module.mixer.branches if len(layer.mixers) > 1 else [module.mixer]
    for spec, mixer in zip(layer.mixers, branches, strict=False):
        assert layer.mixer_branch is not None
        options = mixer.options
        if getattr(options, "nope_every", None) is not None:
            # by then it is known which layers go without
            positions = {} if mixer.has_positions else {"rope_parameters": None, "alibi": False}
            options = dataclasses.replace(options, nope_every=None, **positions)
        around = _around(layer, spec.symbol, layer.mixer_branch, spec)
        yield Part(type(mixer).name, options, spec.symbol, around)


def layout_of(mixers: Sequence[str], ffns: Sequence[str]) -> dict[str, Any]:
    """Return the shortest ``layout`` and ``ffn`` for the letters of each layer, "" for empty."""
    pairs = set(zip(mixers, ffns, strict=True))
    by_letter = all(len(letters) == 1 for letters in mixers) and len(pairs) == len(set(mixers))
    if all(mixers) and (all(ffns) or not any(ffns) or by_letter):
        layers = tuple(Layer(tuple(letters)) for letters in mixers)
        ffn: Any = _pattern(ffns) if all(ffns) or not any(ffns) else dict(sorted(pairs))
        return {"layout": str(Layout(layers)), "ffn": ffn}
    single = [
        layer
        for letters, ffn in zip(mixers, ffns, strict=True)
        for layer in (
            *([Layer(tuple(letters))] if letters else ()),
            *([Layer((), ffn)] if ffn else ()),
        )
    ]
    return {"layout": str(Layout(tuple(single))), "ffn": "-"}


def _pattern(ffns: Sequence[str]) -> str:
    """Return the shortest pattern that repeats to these feed-forwards; "" for none."""
    if not any(ffns):
        return ""
    first = repeated(ffns)
    text = shortest(tuple(first))
    assert parse_ffn(text) == tuple(first)
    return text


def repeated(symbols: Sequence[str]) -> Sequence[str]:
    """Return the shortest prefix that repeats to all symbols."""
    periods = range(1, len(symbols) + 1)
    return next(
        symbols[:n] for n in periods if all(s == symbols[i % n] for i, s in enumerate(symbols))
    )
