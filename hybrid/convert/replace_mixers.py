"""Convert a model to another layout; new mixers are initialised from the attention they replace.

Shapes: D model dim, H query heads, H_kv key heads, K head dim.

A new mixer is initialised from the softmax attention that it replaces, as in MambaInLlama (arXiv
2408.15237, section 3.1) and LoLCATs (arXiv 2410.10254): queries read the state, keys and values are
written to it, and the output projection stays. ``INIT_FROM_ATTENTION``
(``hybrid.convert.init_from_attention``) has the options and the initial gates of each mixer.
Feed-forwards, norms and embeddings are the same tensors, bit for bit.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hybrid.config import lookup
from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.options import did_you_mean
from hybrid.config.registry import mixers as registered
from hybrid.convert.checkpoint import Spec, some
from hybrid.convert.init_from_attention import INIT_FROM_ATTENTION, PROJECTIONS, InitFromAttention
from hybrid.convert.stack import fill, layout_of, on_meta
from hybrid.convert.tensor_sources import Held
from hybrid.layout import Layer, check_bound, parse, resolve
from hybrid.mixers.base import Mixer
from hybrid.mixers.grouped_heads import GroupedHeads
from hybrid.modeling.model import HybridForCausalLM

logger = logging.getLogger(__name__)

Named = Iterator[tuple[str, torch.Tensor]]
Options = Mapping[str, Mapping[str, Any]]

SETTINGS = ("norm_position", "residuals", "canon")
"""Settings by letter; a new letter inherits those of the letter that it replaces."""


def replace_mixers(
    model: HybridForCausalLM, layout: str, mixers: Options | None = None
) -> HybridForCausalLM:
    """Return a new model with another layout and the weights of ``model``; see
    ``MixerReplacement``.

    It shares no memory with ``model``.
    """
    plan = MixerReplacement(model, layout, mixers)
    held = Held(model.state_dict())
    tied = set(model.all_tied_weights_keys)
    fill(plan.model, plan.tensors((n, held.read(n)) for n in held.specs if n not in tied))
    plan.model.config.dtype = model.dtype
    plan.model.generation_config = copy.deepcopy(model.generation_config)
    return plan.model.eval()


class MixerReplacement:
    """A model's tensors under another layout.

    Args:
        model: the current model. Only its config and the names and shapes of its tensors are read,
            so it can be on the meta device.
        layout: cycles over the depth. A layer keeps its mixer if its letter does not change.
        mixers: letter -> options of its mixer that override the inherited ones, as in a config.

    Attributes:
        model: the new model on the meta device.
        replaced: indices of the layers with new mixers.

    Raises:
        LayoutError: the layout does not fill the depth, or has an unknown letter.
        ValueError: a layer that cannot be replaced, or a mixer that cannot be initialised from
            attention; all are listed.
    """

    def __init__(
        self, model: HybridForCausalLM, layout: str, mixers: Options | None = None
    ) -> None:
        old, given = model.config, mixers or {}
        layers = _laid_out(old, layout, given)
        pairs = enumerate(zip(layers, old.layers, strict=True))
        self.replaced = tuple(i for i, (new, was) in pairs if new != was)
        _refuse_kept(old, layers, given)
        self._rules = _rules(old, layers, self.replaced, given)
        self.config = _new_config(old, layers, self.replaced, self._rules, given)
        self.model = on_meta(self.config)
        self._old: dict[int, Any] = {i: model.model.layers[i].mixer for i in self.replaced}
        self._check(model)
        self._report()

    def specs(self, old: Mapping[str, Spec]) -> dict[str, Spec]:
        """Return the specs of the new tensors from those of the model."""
        kept = {name: spec for name, spec in old.items() if self._place(name) is None}
        for i in self.replaced:
            dtype = old[f"model.layers.{i}.mixer.q_proj.weight"].dtype
            for name, tensor in self._new(i).state_dict().items():
                kept[f"model.layers.{i}.mixer.{name}"] = Spec(tuple(tensor.shape), dtype)
        return kept

    def tensors(self, named: Named) -> Named:
        """Yield the new model's tensors from the old ones, in one pass.

        At most the tensors of one layer are in memory, or of several if the tensors come in another
        order.
        """
        wanted = {i: set(self._old[i].state_dict()) for i in self.replaced}
        held: dict[int, dict[str, torch.Tensor]] = {i: {} for i in self.replaced}
        for name, tensor in named:
            place = self._place(name)
            if place is None:
                yield name, tensor
                continue
            layer, leaf = place
            held[layer][leaf] = tensor
            if held[layer].keys() == wanted[layer]:
                yield from self._layer(layer, held.pop(layer))
        assert not held, f"layers without all their tensors: {sorted(held)}"

    def _place(self, name: str) -> tuple[int, str] | None:
        """Return (layer, name in its mixer) of a tensor of a replaced mixer; None for all others."""
        parts = name.split(".", 4)
        if parts[:2] != ["model", "layers"] or parts[3] != "mixer":
            return None
        layer = int(parts[2])
        return (layer, parts[4]) if layer in self._old else None

    def _letter(self, layer: int) -> str:
        return self.config.layers[layer].mixers[0]

    def _new(self, layer: int) -> Any:
        """Return the new mixer of a layer, on the meta device."""
        return self.model.model.layers[layer].mixer

    def _layer(self, layer: int, held: Mapping[str, torch.Tensor]) -> Named:
        rule = self._rules[self._letter(layer)]
        state = self._fresh(layer).state_dict()
        for name in state:
            if name.split(".")[0] in rule.carried and name in held:
                state[name] = _carried(name, held, self._old[layer], state[name].shape, rule)
        dtype = held["q_proj.weight"].dtype
        for name, tensor in state.items():
            yield f"model.layers.{layer}.mixer.{name}", tensor.to(dtype).contiguous()

    def _fresh(self, layer: int) -> Mixer:
        """Return a new mixer on the CPU with initial gates; the same in every process."""
        spec = self.config.stack[layer].mixers[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(layer)
            made = spec.build(layer)
            made.apply(self.model._init_weights)
        self._rules[self._letter(layer)].open(made)
        return made

    def _check(self, model: HybridForCausalLM) -> None:
        """Refuse options with which a copied tensor does not fit."""
        lines = {}
        for i in self.replaced:
            old, new, letter = self._old[i], self._new(i), self._letter(i)
            heads, _, head_dim = old.options.sizes
            for name in PROJECTIONS:
                was, now = getattr(old, name).weight.shape, getattr(new, name).weight.shape
                fits = (heads * head_dim, was[0]) if name in ("k_proj", "v_proj") else (was[0],)
                if now[0] not in fits or now[1] != was[1]:
                    lines[letter, name] = (
                        f"mixers.{letter}: {name} would be {tuple(now)}, and that of layer {i} is"
                        f" {tuple(was)}, {heads} heads of {head_dim}: leave the sizes out"
                    )
        _raise_all(lines.values())
        names = [{n for n in m.state_dict() if self._place(n) is None} for m in (model, self.model)]
        odd = sorted(names[0] ^ names[1])
        _raise_all([f"the new layout would add or take away {some(odd)}"] if odd else [])

    def _report(self) -> None:
        """Warn of features of the softmax layers that the new mixers lack."""
        lost: dict[str, set[str]] = {}
        for i in self.replaced:
            found = self._rules[self._letter(i)].lost(self._old[i].options, self._new(i).options)
            lost.setdefault(self._letter(i), set()).update(found)
        for letter, names in lost.items():
            if names:
                name, words = self.config.stack.mixers[letter].cls.name, ", ".join(sorted(names))
                logger.warning(
                    "%s (%s) goes without what the layers it replaces had: %s", letter, name, words
                )


def _raise_all(lines: Any) -> None:
    """Raise one ValueError for all lines, if there are any."""
    lines = list(lines)
    if len(lines) == 1:
        raise ValueError(lines[0])
    if lines:
        raise ValueError("\n  ".join(["the layout cannot be changed:", *lines]))


def _laid_out(old: HybridConfig, layout: str, given: Options) -> tuple[Layer, ...]:
    """Return the new stack; each layer differs from the old one only in its mixer."""
    parsed = parse(layout)
    check_bound(parsed, [*registered.symbols(), *(old.mixers or {}), *given])
    layers = resolve(parsed, "-" if parsed.names_ffn else "", old.num_hidden_layers)
    if not parsed.names_ffn:
        pairs = zip(layers, old.layers, strict=True)
        layers = tuple(Layer(new.mixers, was.ffn) if was.mixers else new for new, was in pairs)
    unused = sorted(set(given) - set(parsed.symbols()))
    _raise_all([f"mixers.{s}: the layout {layout!r} has no {s}" for s in unused])
    lines: dict[tuple[Layer, Layer], str] = {}
    for i, (new, was) in enumerate(zip(layers, old.layers, strict=True)):
        if new.ffn != was.ffn or (new != was and (len(new.mixers), len(was.mixers)) != (1, 1)):
            text = (
                f"layer {i} is {was} and would become {new}: one mixer can be replaced by one other"
            )
            lines.setdefault((was, new), text)
    _raise_all(lines.values())
    return layers


def _refuse_kept(old: HybridConfig, layers: tuple[Layer, ...], given: Options) -> None:
    """Refuse options for letters that keep their layers, and options that would change those layers."""
    lines = []
    kept = {
        s for new, was in zip(layers, old.layers, strict=True) if new == was for s in new.mixers
    }
    for letter in sorted(kept):
        if letter in given:
            lines.append(f"mixers.{letter}: its layers stay as they are; take another letter")
        if getattr(old.stack.mixers[letter].options, "nope_every", None) is not None:
            lines.append(
                f"mixers.{letter}.nope_every: counts the softmax layers, which become fewer; bind a"
                " letter of its own to the layers without positions first"
            )
    _raise_all(lines)


def _rules(
    old: HybridConfig, layers: tuple[Layer, ...], replaced: tuple[int, ...], given: Options
) -> dict[str, InitFromAttention]:
    """Return the rule of each new letter; the layers that it replaces must be attention."""
    lines: dict[str, str] = {}
    rules: dict[str, InitFromAttention] = {}
    for i in replaced:
        was, letter = old.layers[i].mixers[0], layers[i].mixers[0]
        cls, name = old.stack.mixers[was].cls, _mixer_name(old, letter, given)
        shared = lookup.shared_at(old, was) is not None
        if shared or not issubclass(cls, GroupedHeads):
            why = "shares its weights" if shared else "has no queries, keys and values to hand on"
            text = f"layer {i} ({was}, {cls.name}) {why}; layers that can be replaced are those of"
            lines.setdefault(was, f"{text} softmax_attention and sliding_window_attention")
        if name in INIT_FROM_ATTENTION:
            rules[letter] = INIT_FROM_ATTENTION[name]
        elif name in registered.names():
            text = f"layer {i} ({letter}, {name}) cannot inherit from softmax attention; those that"
            lines.setdefault(letter, f"{text} can: {', '.join(sorted(INIT_FROM_ATTENTION))}")
        else:
            near = did_you_mean(name, registered.names())
            lines.setdefault(letter, f"mixers.{letter}.type: no mixer {name!r}, {near}")
    _raise_all(lines.values())
    return rules


def _mixer_name(old: HybridConfig, letter: str, given: Options) -> str:
    """Return the mixer of a letter: from the given options, the model, or the registry."""
    bound = given.get(letter) or (old.mixers or {}).get(letter, {})
    return str(bound.get("type", registered.symbols().get(letter, letter)))


def _new_config(
    old: HybridConfig,
    layers: tuple[Layer, ...],
    replaced: tuple[int, ...],
    rules: Mapping[str, InitFromAttention],
    given: Options,
) -> HybridConfig:
    values = old.to_dict()
    bound = {s: dict(options) for s, options in (old.mixers or {}).items()}
    for i in reversed(replaced):  # the first layer of a letter decides
        was, letter = old.layers[i].mixers[0], layers[i].mixers[0]
        own = dict(given.get(letter) or (old.mixers or {}).get(letter, {}))
        bound[letter] = {**rules[letter].options(old.stack.mixers[was].options), **own}
        for setting in SETTINGS:
            by_letter = values.get(setting)
            if isinstance(by_letter, dict) and was in by_letter:
                values[setting] = {letter: by_letter[was], **by_letter}
    if old.num_mtp_layers and old.mtp_layout is None:
        values["mtp_layout"] = old.layers[-1].mixers[0]
    used = {s for layer in layers for s in layer.mixers} | set(values.get("mtp_layout") or "")
    values["mixers"] = {s: options for s, options in bound.items() if s in used}
    letters, ffns = [layer.mixers for layer in layers], [layer.ffn or "" for layer in layers]
    return HybridConfig.from_dict(values | layout_of(["".join(word) for word in letters], ffns))


def _carried(
    name: str,
    held: Mapping[str, torch.Tensor],
    old: Any,
    wanted: torch.Size,
    rule: InitFromAttention,
) -> torch.Tensor:
    """Return one tensor of the old mixer in the shape that the new one needs."""
    tensor = held[name]
    heads, kv_heads, head_dim = old.options.sizes
    if name[:6] in ("q_proj", "k_proj") and "qk_norm" not in rule.keeps:
        tensor = _folded(tensor, held.get(f"{name[0]}_norm.weight"), old.options.qk_norm_type)
    if tensor.shape == wanted:
        return tensor
    per_head = tensor.unflatten(0, (kv_heads, head_dim))
    return per_head.repeat_interleave(heads // kv_heads, dim=0).flatten(0, 1)


def _folded(tensor: torch.Tensor, weight: torch.Tensor | None, kind: str) -> torch.Tensor:
    """Fold the weight of a norm of q or k into the projection; the normalisation itself is dropped."""
    if weight is None:
        return tensor
    factor = weight.float() + (1.0 if kind == "zero_centered_rmsnorm" else 0.0)
    factor = factor.repeat(tensor.shape[0] // factor.shape[0])
    return (tensor.float() * factor.view(-1, *[1] * (tensor.ndim - 1))).to(tensor.dtype)
