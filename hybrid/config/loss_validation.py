"""Validation of the loss settings (``hybrid.modeling.training_losses``), one line per mistake."""

from __future__ import annotations

import inspect
from typing import Any

from hybrid.config.fields import ConfigFields
from hybrid.config.options import ConfigError
from hybrid.config.registry import feed_forwards, mixers
from hybrid.layout import Layer, LayoutError, check_bound, parse

MUP_INITS = ("fixed", "depth_scaled")
"""Initialisation schemes that use ``initializer_range``, which muP scales."""


def find_mistakes(config: ConfigFields, layers: tuple[Layer, ...]) -> list[str]:
    """Return a line for each mistake; ``layers`` is the stack, () if other fields are invalid."""
    if not layers:
        return []
    lines = [] if config.mtp_layout is None else _wrong_mtp_layout(config)
    return lines or _mup_base_problems(config)


def _wrong_mtp_layout(config: ConfigFields) -> list[str]:
    if not config.num_mtp_layers:
        return [
            f"mtp_layout: expected null with num_mtp_layers: 0, got {config.mtp_layout!r};"
            " try num_mtp_layers: 1"
        ]
    bound = config.mixers if isinstance(config.mixers, dict) else {}
    fed = config.feed_forwards if isinstance(config.feed_forwards, dict) else {}
    try:
        layout = parse(config.mtp_layout or "")
        check_bound(layout, {*mixers.symbols(), *bound} - set(feed_forwards.symbols()))
    except LayoutError as error:
        return [f"mtp_layout: {error}"]
    if not layout.symbols():
        return [f"mtp_layout: expected at least one mixer, got {config.mtp_layout!r}"]
    known = {*feed_forwards.symbols(), *fed}
    used = {layer.ffn for layer in layout.layers if layer.ffn}
    return [
        f"mtp_layout: expected a bound feed-forward, got {s!r}; try feed_forwards: {{{s}: ...}}"
        for s in sorted(used - known)
    ]


def _mup_base_problems(config: ConfigFields) -> list[str]:
    """Report mistakes of the config at ``mup_base_width``, at which it must be valid as well."""
    base = config.mup_base_width
    if base is None:
        return []
    if config.init not in MUP_INITS:
        known = " or ".join(map(repr, MUP_INITS))
        return [
            f"mup_base_width: expected init {known}, whose std it scales, got init {config.init!r}"
        ]
    cls: Any = type(config)
    values = {name: getattr(config, name) for name in inspect.get_annotations(cls)}
    try:
        cls(**{**values, "hidden_size": base, "mup_base_width": None})
    except ConfigError as error:
        return [f"mup_base_width: at hidden_size {base}, {line}" for line in error.mistakes]
    return []
