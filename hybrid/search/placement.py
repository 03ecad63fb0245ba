"""Placements: which of a model's softmax layers stay, their layout strings and cache bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybrid.config import lookup
from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.options import ConfigError
from hybrid.layout import Layer
from hybrid.layout.types import Layout
from hybrid.mixers import Mixer
from hybrid.plan import human_bytes, mixer_cache_bytes, plan

Placement = frozenset[int]
"""Indices of the layers whose mixer stays softmax attention."""

SOFTMAX = "softmax_attention"


def softmax_layers(config: HybridConfig) -> tuple[int, ...]:
    """Return the layers that consist of one full softmax attention with its own weights."""
    return tuple(
        i
        for i, layer in enumerate(config.stack)
        if len(layer.mixers) == 1
        and layer.mixers[0].cls.name == SOFTMAX
        and lookup.shared_at(config, *layer.symbols) is None
    )


def layout_string(config: HybridConfig, letters: Sequence[tuple[str, ...]]) -> str:
    """Return the shortest layout of a stack like ``config``'s with other mixers.

    Args:
        config: the stack; its feed-forwards stay.
        letters: symbols of each layer's mixers.
    """
    literal = any(not layer.mixers for layer in config.layers)
    pairs = zip(letters, config.layers, strict=True)
    return str(Layout(tuple(Layer(new, was.ffn if literal else None) for new, was in pairs)))


@dataclass(frozen=True)
class Space:
    """The placements of a model under a budget.

    Attributes:
        config: config of the model.
        layers: the layers that are searched.
        linear: symbol of the mixer that replaces softmax attention.
        fixed_bytes: cache bytes of everything else, for one sequence of ``context`` tokens.
        layer_bytes: layer -> cache bytes with softmax attention, and with the linear mixer.
        most_layers: largest number of layers that stay; None for no limit.
        most_bytes: largest cache; None for no limit.
        context: length at which the cache is counted.
    """

    config: HybridConfig
    layers: tuple[int, ...]
    linear: str
    fixed_bytes: int
    layer_bytes: dict[int, tuple[int, int]]
    most_layers: int | None
    most_bytes: int | None
    context: int

    def letters(self, kept: Placement) -> list[tuple[str, ...]]:
        """Return the symbols of each layer's mixers."""
        return [
            (self.linear,) if i in self.layers and i not in kept else layer.mixers
            for i, layer in enumerate(self.config.layers)
        ]

    def layout(self, kept: Placement) -> str:
        """Return the layout string of a placement."""
        return layout_string(self.config, self.letters(kept))

    def cache_bytes(self, kept: Placement) -> int:
        """Return the cache bytes of one sequence of ``context`` tokens."""
        sizes = self.layer_bytes
        return self.fixed_bytes + sum(sizes[i][i not in kept] for i in self.layers)

    def fits(self, kept: Placement) -> bool:
        """Return whether a placement is within the budget."""
        if self.most_layers is not None and len(kept) > self.most_layers:
            return False
        return self.most_bytes is None or self.cache_bytes(kept) <= self.most_bytes

    def first(self, order: Iterable[int], count: int | None = None) -> Placement:
        """Return the first layers of an order that fit the budget together, at most ``count``."""
        kept: Placement = frozenset()
        for i in order:
            if count is not None and len(kept) == count:
                break
            if self.fits(kept | {i}):
                kept |= {i}
        return kept

    @property
    def most(self) -> int:
        """Return the largest number of layers that fit."""
        cheap = sorted(self.layers, key=lambda i: self.layer_bytes[i][0] - self.layer_bytes[i][1])
        return len(self.first(cheap))

    @property
    def complete(self) -> Placement:
        """Return the placement of the model as it is."""
        return frozenset(self.layers)

    def uniform(self, count: int) -> Placement:
        """Return ``count`` layers at equal distances, the last of each group: SSD -> layer 2, 5, ..."""
        n = len(self.layers)
        return frozenset(self.layers[(k + 1) * n // count - 1] for k in range(count))

    def last(self, count: int) -> Placement:
        """Return the last ``count`` layers."""
        return frozenset(self.layers[len(self.layers) - count :])


def check_layers(config: HybridConfig, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Return the layers to search: those that are asked for, or all with softmax attention.

    Raises:
        ConfigError: a layer without softmax attention, or fewer than two layers.
    """
    there = softmax_layers(config)
    wrong = [i for i in asked or () if i not in there]
    if wrong:
        raise ConfigError(
            [f"layers: expected some of the softmax layers {list(there)}, got {wrong}"]
        )
    layers = there if asked is None else tuple(sorted(set(asked)))
    if len(layers) < 2:
        raise ConfigError(
            [
                f"distill.teacher: expected at least two layers of softmax attention to choose from, got"
                f" {len(layers)} in layout {config.layout!r}"
            ]
        )
    return layers


def measure_space(
    teacher: Any,
    student: Any,
    layers: tuple[int, ...],
    linear: str,
    *,
    most_layers: int | None,
    most_bytes: int | None,
    context: int,
) -> Space:
    """Return the space of placements between two models, with bfloat16 keys and values.

    Args:
        teacher: the model with softmax attention in ``layers``.
        student: the same with the linear mixer in all of them.
        layers: the layers that are searched.
        linear: symbol of the linear mixer.
        most_layers, most_bytes: the budget.
        context: length at which the cache is counted.

    Raises:
        ConfigError: no placement fits the budget, or all do.
    """
    mixers: list[tuple[Mixer, Mixer]] = [
        (teacher.model.layers[i].mixer, student.model.layers[i].mixer) for i in layers
    ]
    sizes = {
        i: (mixer_cache_bytes(old, context), mixer_cache_bytes(new, context))
        for i, (old, new) in zip(layers, mixers, strict=True)
    }
    total = plan(teacher.config, context, torch.bfloat16).cache_bytes
    fixed = total - sum(softmax for softmax, _ in sizes.values())
    space = Space(teacher.config, layers, linear, fixed, sizes, most_layers, most_bytes, context)
    _check_budget(space)
    return space


def _check_budget(space: Space) -> None:
    least, whole = space.cache_bytes(frozenset()), space.cache_bytes(space.complete)
    if space.most_bytes is not None and least > space.most_bytes:
        raise ConfigError(
            [
                f"budget.cache: expected at least {least} bytes ({human_bytes(least)}, without any"
                f" softmax layer) at {space.context} tokens, got {space.most_bytes}"
            ]
        )
    if space.fits(space.complete):
        what, top = "layers", str(len(space.layers) - 1)
        if space.most_bytes is not None:
            what, top = "cache", f"{whole - 1} bytes ({human_bytes(whole)} is the model as it is)"
        raise ConfigError([f"budget.{what}: expected at most {top}, got one that all layers fit"])
