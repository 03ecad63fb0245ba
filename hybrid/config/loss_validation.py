"""What can be wrong with the loss settings, a line each (`hybrid.modeling.training_losses`)."""

from __future__ import annotations

import inspect
from typing import Any

from hybrid.config.fields import StackFields
from hybrid.config.options import ConfigError
from hybrid.config.registry import feed_forwards, mixers
from hybrid.layout import Layer, LayoutError, check_bound, parse

MUP_INITS = ("fixed", "depth_scaled")
"""The initialisations that take the std from the config, which muP then scales."""


def find_mistakes(config: StackFields, layers: tuple[Layer, ...]) -> list[str]:
    """All that is wrong; `layers` is the stack, or () where the rest of the config is wrong."""
    if not layers:
        return []
    lines = [] if config.mtp_layout is None else _wrong_mtp_layout(config)
    return lines or _mup_base_problems(config)


def _wrong_mtp_layout(config: StackFields) -> list[str]:
    if not config.num_mtp_layers:
        return ["mtp_layout: set, but num_mtp_layers is 0"]
    bound = config.mixers if isinstance(config.mixers, dict) else {}
    fed = config.feed_forwards if isinstance(config.feed_forwards, dict) else {}
    try:
        layout = parse(config.mtp_layout or "")
        check_bound(layout, {*mixers.symbols(), *bound} - set(feed_forwards.symbols()))
    except LayoutError as error:
        return [f"mtp_layout: {error}"]
    if not layout.symbols():
        return [f"mtp_layout: {config.mtp_layout!r} has no mixer, so tokens would never meet"]
    known = {*feed_forwards.symbols(), *fed}
    used = {layer.ffn for layer in layout.layers if layer.ffn}
    return [f"mtp_layout: {s!r} stands for no feed-forward" for s in sorted(used - known)]


def _mup_base_problems(config: StackFields) -> list[str]:
    """Why a config cannot be scaled from its `mup_base_width`: it has to be right at that width, too."""
    base = config.mup_base_width
    if base is None:
        return []
    if config.init not in MUP_INITS:
        known = " or ".join(map(repr, MUP_INITS))
        return [f"mup_base_width: scales the std of init {known}, and init is {config.init!r}"]
    cls: Any = type(config)
    values = {name: getattr(config, name) for name in inspect.get_annotations(cls)}
    try:
        cls(**{**values, "hidden_size": base, "mup_base_width": None})
    except ConfigError as error:
        return [f"mup_base_width: at hidden_size {base}, {line}" for line in error.mistakes]
    return []
