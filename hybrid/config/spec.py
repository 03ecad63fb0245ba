"""Specification of every layer of the stack, resolved once from the config.

``resolve_stack`` converts the fields of a config to one ``LayerSpec`` for each layer. The layer,
its residuals, canon layers, weight sharing, the cache, the cost and the converters read the
specification and never the config.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hybrid.config import lookup
from hybrid.config.block_options import SharedOptions
from hybrid.config.fields import NormName, StackFields
from hybrid.config.sizes import Sizes
from hybrid.layout import Layer

LINEAR, FULL = "linear_attention", "full_attention"
LOCAL = ("sliding_attention", "chunked_attention")
"""Mixer types, from which the model chooses the mask that it passes to a mixer."""

HYBRID_STATES, HYBRID_KEYS, HYBRID_NONE = "hybrid_states", "hybrid_keys", "hybrid_none"
"""Types of layers with a cache layer of this package: without and with keys of all tokens."""


@dataclass(frozen=True)
class MixerSpec:
    """One mixer of one layer.

    Attributes:
        symbol: letter in the layout.
        cls, options: class and completed options.
        sizes: sizes that it is built with.
        has_state: whether the cache holds a recurrent or a convolution state for it.
        canon: whether its convolution is a canon layer (position B).
        input_multiplier, output_multiplier: multipliers of its branch among parallel mixers.
    """

    symbol: str
    cls: Any
    options: Any
    sizes: Sizes
    has_state: bool
    canon: bool
    input_multiplier: float
    output_multiplier: float

    def build(self, layer_idx: int) -> Any:
        """Return a new mixer module for layer ``layer_idx``."""
        return self.cls(self.options, self.sizes, layer_idx)


@dataclass(frozen=True)
class FeedForwardSpec:
    """Feed-forward of one layer: symbol, class, completed options, and sizes."""

    symbol: str
    cls: Any
    options: Any
    sizes: Sizes

    def build(self, layer_idx: int) -> Any:
        """Return a new feed-forward module for layer ``layer_idx``."""
        return self.cls(self.options, self.sizes, layer_idx)


@dataclass(frozen=True)
class BranchSpec:
    """Residual branch: norm position, multipliers, and number of input channels."""

    norm: NormName
    norm_eps: float
    norm_position: str
    input_size: int
    hidden_size: int
    input_multiplier: float
    output_multiplier: float
    skip_multiplier: float


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the stack.

    Attributes:
        layer_idx: index in the stack, from 0.
        layer: symbols of the layer.
        mixers: mixers, in parallel if several.
        ffn: feed-forward, or None.
        mixer_branch, ffn_branch: their residual branches.
        combine: how parallel mixers are combined.
        canon: positions of separate canon layers, a subset of A, C and D.
        canon_width: kernel width of canon layers.
        shared: weight sharing of the layer, or None.
        source: index of the layer whose weights are used; ``layer_idx`` without sharing.
        hidden_size: D.
    """

    layer_idx: int
    layer: Layer
    mixers: tuple[MixerSpec, ...]
    ffn: FeedForwardSpec | None
    mixer_branch: BranchSpec | None
    ffn_branch: BranchSpec | None
    combine: str
    canon: str
    canon_width: int
    shared: SharedOptions | None
    source: int
    hidden_size: int

    @property
    def symbols(self) -> tuple[str, ...]:
        """Letters of the mixers."""
        return self.layer.mixers

    @property
    def layer_type(self) -> str:
        """Layer type, from which transformers' caches choose the class of the cache layer."""
        types = [mixer.cls.layer_type for mixer in self.mixers]
        if not self.canon and not any(mixer.has_state for mixer in self.mixers):
            if not types:
                return HYBRID_NONE
            if types == [FULL]:
                return FULL
        return HYBRID_KEYS if FULL in types else HYBRID_STATES


@dataclass(frozen=True)
class StackSpec:
    """Layers of a stack, and properties of the stack as a whole."""

    layers: tuple[LayerSpec, ...]
    sizes: Sizes

    def __iter__(self) -> Iterator[LayerSpec]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer_idx: int) -> LayerSpec:
        return self.layers[layer_idx]

    @cached_property
    def mixers(self) -> dict[str, MixerSpec]:
        """Letter -> mixer of the first layer with that letter, in stack order."""
        found: dict[str, MixerSpec] = {}
        for layer in self.layers:
            for mixer in layer.mixers:
                found.setdefault(mixer.symbol, mixer)
        return found

    @cached_property
    def feed_forwards(self) -> dict[str, FeedForwardSpec]:
        """Symbol -> feed-forward, in stack order."""
        return {layer.ffn.symbol: layer.ffn for layer in self.layers if layer.ffn is not None}

    @cached_property
    def has_state(self) -> bool:
        """Whether the cache of any layer holds more than the keys and values of all tokens."""
        return any(layer.layer_type in (HYBRID_STATES, HYBRID_KEYS) for layer in self.layers)

    @cached_property
    def has_local(self) -> bool:
        """Whether any mixer is softmax attention over a bounded window."""
        return any(mixer.cls.layer_type in LOCAL for mixer in self.mixers.values())

    @cached_property
    def first_key_layer(self) -> int | None:
        """Index of the first layer that caches keys of all tokens, or None."""
        kept = (i for i, x in enumerate(self.layers) if x.layer_type in (FULL, HYBRID_KEYS))
        return next(kept, None)

    @property
    def has_keys(self) -> bool:
        """Whether any layer caches keys of all tokens."""
        return self.first_key_layer is not None

    @cached_property
    def ends_normed(self) -> bool:
        """Whether the last branch normalises the stream, so that the head needs no norm."""
        last = self.layers[-1]
        branch = last.ffn_branch or last.mixer_branch
        return branch is not None and branch.norm_position == "post"


def resolve_stack(fields: StackFields, layers: tuple[Layer, ...] | None = None) -> StackSpec:
    """Resolve the fields of a valid config, layer by layer.

    Args:
        fields: fields of the config.
        layers: layers of the layout, if already parsed.
    """
    layers = lookup.layers_of(fields) if layers is None else layers
    stack_sizes = Sizes(
        hidden_size=fields.hidden_size,
        num_hidden_layers=len(layers),
        norm_eps=fields.norm_eps,
        max_position_embeddings=fields.max_position_embeddings,
        init=fields.init,
        num_residual_branches=num_residual_branches(layers),
        num_mixing_layers=sum(bool(layer.mixers) for layer in layers),
    )
    mixers = {s: lookup.mixer_of(fields, s) for s in _letters(layers)}
    feed_forwards = {
        s: lookup.feed_forward_of(fields, s) for s in {layer.ffn for layer in layers if layer.ffn}
    }
    seen: Counter[Any] = Counter()  # layers so far: with a mixer, by kind, and by letters
    specs = []
    for i, layer in enumerate(layers):
        sizes = dataclasses.replace(stack_sizes, mixing_idx=seen["mixing"])
        specs.append(_layer_spec(fields, i, layer, layers, sizes, mixers, feed_forwards, seen))
        seen["mixing"] += bool(layer.mixers)
        for kind in {mixers[s][0].kind for s in layer.mixers}:
            seen[kind] += 1
    return StackSpec(tuple(specs), stack_sizes)


def _layer_spec(
    fields: StackFields,
    layer_idx: int,
    layer: Layer,
    layers: tuple[Layer, ...],
    sizes: Sizes,
    mixers: dict[str, tuple[Any, Any]],
    feed_forwards: dict[str, tuple[Any, Any]],
    seen: Counter[Any],
) -> LayerSpec:
    mixer_branch = ffn_branch = ffn = None
    if layer.mixers:
        mixer_branch = _branch(fields, sizes, layer.mixers, len(layer.mixers) > 1)
    if layer.ffn:
        ffn = FeedForwardSpec(layer.ffn, *feed_forwards[layer.ffn], sizes)
        ffn_branch = _branch(fields, sizes, (layer.ffn, *layer.mixers), False, sizes.hidden_size)
    built = []
    for symbol in layer.mixers:
        cls, options = mixers[symbol]
        residual = lookup.residual_at(fields, symbol)
        built.append(
            MixerSpec(
                symbol,
                cls,
                options,
                dataclasses.replace(
                    sizes, hidden_size=lookup.input_size(fields, symbol), kind_idx=seen[cls.kind]
                ),
                has_state=cls.uses_state(options),
                canon="B" in lookup.canon_at(fields, symbol),
                input_multiplier=residual.input_multiplier,
                output_multiplier=residual.output_multiplier,
            )
        )
    return LayerSpec(
        layer_idx=layer_idx,
        layer=layer,
        mixers=tuple(built),
        ffn=ffn,
        mixer_branch=mixer_branch,
        ffn_branch=ffn_branch,
        combine=fields.parallel_combine,
        canon=lookup.canon_of(fields, layer),
        canon_width=fields.canon_width,
        shared=lookup.shared_at(fields, *layer.mixers),
        source=_source(fields, layer_idx, layers),
        hidden_size=fields.hidden_size,
    )


def _branch(
    fields: StackFields,
    sizes: Sizes,
    symbols: tuple[str, ...],
    side_by_side: bool,
    input_size: int | None = None,
) -> BranchSpec:
    """Return the residual branch of these symbols; parallel mixers have their own multipliers."""
    options = lookup.residual_at(fields, *symbols)
    skip = options.skip_multiplier
    if skip is None:
        skip = default_skip_multiplier(fields.init, sizes.num_residual_branches)
    return BranchSpec(
        norm=fields.norm,
        norm_eps=fields.norm_eps,
        norm_position=lookup.norm_position_at(fields, *symbols),
        input_size=input_size or lookup.input_size(fields, *symbols),
        hidden_size=fields.hidden_size,
        input_multiplier=1.0 if side_by_side else options.input_multiplier,
        output_multiplier=1.0 if side_by_side else options.output_multiplier,
        skip_multiplier=skip,
    )


def _source(fields: StackFields, layer_idx: int, layers: tuple[Layer, ...]) -> int:
    """Return the index of the layer whose weights a layer uses: itself, or the first of its block."""
    layer = layers[layer_idx]
    shared = lookup.shared_at(fields, *layer.mixers)
    if shared is None:
        return layer_idx
    places = [i for i, other in enumerate(layers) if other.mixers == layer.mixers]
    return places[places.index(layer_idx) % shared.blocks]


def _letters(layers: tuple[Layer, ...]) -> dict[str, None]:
    return dict.fromkeys(symbol for layer in layers for symbol in layer.mixers)


def num_residual_branches(layers: tuple[Layer, ...]) -> int:
    """Return the number of sublayers that add to the residual stream."""
    return sum(bool(layer.mixers) + bool(layer.ffn) for layer in layers)


def default_skip_multiplier(init: str, branches: int) -> float:
    """Return 1, or DeepNorm's alpha (arXiv 2203.00555), (2 N)^(1/4) for N layers of two branches."""
    return branches**0.25 if init == "deepnorm" else 1.0
