"""Validation of the block options (``hybrid.config.block_options``), one line per mistake."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from hybrid.config import lookup
from hybrid.config.block_options import POSITIONS, NormPosition, ResidualOptions, SharedOptions
from hybrid.config.declare import build
from hybrid.config.fields import ConfigFields
from hybrid.config.options import did_you_mean
from hybrid.config.registry import mixers
from hybrid.config.spec import default_skip_multiplier, num_residual_branches
from hybrid.layout import DEFAULT, FFN, Layer


def find_mistakes(config: ConfigFields, layers: tuple[Layer, ...]) -> list[str]:
    """Return a line for each mistake; ``layers`` is the stack, or () if the layout is invalid."""
    lines: list[str] = []
    list(by_symbol(config, "norm_position", lines))
    for path, values in by_symbol(config, "residuals", lines):
        if isinstance(values, Mapping):  # the annotation of the field covers the rest
            build(ResidualOptions, values, path, lines)
    lines += _canon(config)
    lines += _shared(config)
    if lines or not layers:
        return lines
    lines = _unlike_side_by_side(config, layers) + _deepnorm_without_norms(config, layers)
    return lines + _canon_without_room(config, layers) + _unlike_blocks(config, layers)


def by_symbol(config: ConfigFields, field: str, lines: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield path and value of each entry of a setting per symbol; report unknown symbols."""
    setting = getattr(config, field)
    if not isinstance(setting, Mapping):
        return
    bound = config.mixers if isinstance(config.mixers, dict) else {}
    known = [*mixers.symbols(), *(s for s in bound if isinstance(s, str)), *FFN, DEFAULT]
    for symbol, value in setting.items():
        path = f"{field}.{symbol}"
        if symbol in known:
            yield path, value
        else:
            near = did_you_mean(str(symbol), known)
            lines.append(f"{path}: expected the symbol of a mixer or a feed-forward, {near}")


def _unlike_side_by_side(config: ConfigFields, layers: tuple[Layer, ...]) -> list[str]:
    """Report parallel mixers of one layer with different residuals, which they share."""
    lines = []
    for layer in dict.fromkeys(layers):
        asked = {
            "norm_position": [lookup.norm_position_at(config, s) for s in layer.mixers],
            "residuals, skip_multiplier": [
                _skip_multiplier(config, s, layers) for s in layer.mixers
            ],
            "canon A": ["A" in lookup.canon_at(config, s) for s in layer.mixers],
        }
        for name, values in asked.items():
            if len(set(values)) > 1:
                found = ", ".join(f"{s}: {v}" for s, v in zip(layer.mixers, values, strict=True))
                lines.append(
                    f"{name}: expected one value for the mixers of [{''.join(layer.mixers)}], which"
                    f" share one residual, got {found}; try the same value for each"
                )
    return lines


def _skip_multiplier(config: ConfigFields, symbol: str, layers: tuple[Layer, ...]) -> float:
    skip = lookup.residual_at(config, symbol).skip_multiplier
    return (
        default_skip_multiplier(config.init, num_residual_branches(layers))
        if skip is None
        else skip
    )


def _deepnorm_without_norms(config: ConfigFields, layers: tuple[Layer, ...]) -> list[str]:
    """Report norm positions without which the stream grows by alpha at every branch."""
    if config.init != "deepnorm":
        return []
    branches = [layer.mixers for layer in layers if layer.mixers]
    branches += [(layer.ffn, *layer.mixers) for layer in layers if layer.ffn]
    good = ("post", "normed")
    found = {lookup.norm_position_at(config, *symbols) for symbols in branches} - set(good)
    count = num_residual_branches(layers)
    alpha = default_skip_multiplier(config.init, count)
    unscaled = [p for p in get_args(NormPosition) if p in found]
    if not unscaled:
        return []
    return [
        f"norm_position: expected {' or '.join(map(repr, good))} with init deepnorm, which"
        f" multiplies the stream by {alpha:.3g} at each of {count} branches, got {unscaled[0]!r};"
        f" try norm_position: {good[0]}"
    ]


def _canon(config: ConfigFields) -> list[str]:
    lines: list[str] = []
    asked = list(by_symbol(config, "canon", lines))
    if isinstance(config.canon, (str, list)):
        asked = [("canon", config.canon)]
    for path, positions in asked:
        if isinstance(positions, (str, list)):
            lines += [
                f"{path}: expected positions of {', '.join(POSITIONS)}, got {at!r}"
                for at in positions
                if at not in tuple(POSITIONS)
            ]
    return lines


def _canon_without_room(config: ConfigFields, layers: Iterable[Layer]) -> list[str]:
    """Report mixers and feed-forwards without support for the configured canon positions."""
    lines = []
    for symbol in dict.fromkeys(s for layer in layers for s in layer.mixers):
        if "B" in lookup.canon_at(config, symbol) and (problem := _canon_problem(config, symbol)):
            rest = "".join(at for at in lookup.canon_at(config, symbol) if at != "B")
            lines.append(f"canon: {problem}, or canon: {{{symbol}: {rest!r}, ...}} without B")
    for layer in dict.fromkeys(layers):
        if layer.ffn and "D" in lookup.canon_of(config, layer):
            cls = lookup.feed_forward_of(config, layer.ffn)[0]
            if not cls.takes_canon:
                lines.append(
                    f"canon: expected a feed-forward that accepts a convolution for D, got"
                    f" {cls.name} of {layer.ffn!r}; try canon: {{{layer.ffn}: AC, ...}} without D"
                )
    return list(dict.fromkeys(lines))


def _canon_problem(config: ConfigFields, symbol: str) -> str | None:
    """Return why the mixer of a symbol cannot have a canon layer on q, k, v, or None if it can."""
    cls = lookup.bound_class(config, "mixers", mixers, symbol)
    given = lookup.bindings(config, "mixers").get(symbol, {})
    fields = {f.name: f.default for f in dataclasses.fields(cls.Options)}
    if "conv_size" not in fields:
        return (
            f"expected a mixer with a convolution for B, got {cls.name} of {symbol!r};"
            " try another mixer"
        )
    if given.get("conv_size", fields["conv_size"]) is None:
        return None
    return (
        f"expected B in place of the mixer's own convolution, got both for {cls.name} of"
        f" {symbol!r}; try mixers.{symbol}.conv_size: null"
    )


def _shared(config: ConfigFields) -> list[str]:
    lines: list[str] = []
    for path, values in by_symbol(config, "shared", lines):
        symbol = path.removeprefix("shared.")
        if symbol in (*FFN, DEFAULT):
            lines.append(f"{path}: expected the letter of a mixer, got {symbol!r}; try shared.S")
            continue
        build(SharedOptions, values, path, lines)
    return lines


def _unlike_blocks(config: ConfigFields, layers: tuple[Layer, ...]) -> list[str]:
    """Report layers that cannot share their weights, and outputs without a next layer."""
    lines = []
    for symbol in config.shared or {}:
        options = lookup.shared_at(config, symbol)
        assert options is not None
        path = f"shared.{symbol}"
        for layer in dict.fromkeys(layers):
            if symbol in layer.mixers and len(layer.mixers) > 1:
                lines.append(
                    f"{path}: expected layers with the one mixer {symbol!r}, got"
                    f" [{''.join(layer.mixers)}]; try {symbol!r} as a layer by itself"
                )
        places = [i for i, layer in enumerate(layers) if layer.mixers == (symbol,)]
        if places and options.blocks > len(places):
            lines.append(
                f"{path}.blocks: expected at most {len(places)}, the number of layers of"
                f" {symbol!r}, got {options.blocks}"
            )
        for block in range(min(options.blocks, len(places))):
            kinds = {layers[i].ffn for i in places[block :: options.blocks]}
            if len(kinds) > 1:
                found = " and ".join(sorted(repr(kind or "") for kind in kinds))
                lines.append(
                    f"{path}: expected one feed-forward for all layers of a block, got {found};"
                    f" try ffn: {{{symbol}: '-', default: ...}}"
                )
        if options.output == "next" and places and places[-1] == len(layers) - 1:
            lines.append(
                f"{path}.output: expected 'replace' or 'add' for the last layer, got 'next'"
            )
        if options.concat_embeddings and lookup.norm_position_at(config, symbol) == "normed":
            lines.append(
                f"{path}.concat_embeddings: expected another norm_position than 'normed', in which"
                f" the input of width 2 D would become the stream; try norm_position: pre"
            )
    return lines
