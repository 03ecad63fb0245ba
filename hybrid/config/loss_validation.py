"""What can be wrong with the loss settings, a line each (`hybrid.modeling.training_losses`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hybrid.config.registry import feed_forwards, mixers
from hybrid.layout import Layer, LayoutError, check_bound, parse
from hybrid.modeling.mup import base_problems

if TYPE_CHECKING:
    from hybrid.config.hybrid_config import HybridConfig


def find_mistakes(config: HybridConfig, layers: tuple[Layer, ...]) -> list[str]:
    """All that is wrong; `layers` is the stack, or () where the rest of the config is wrong."""
    lines = []
    for name, least in (("z_loss", 0), ("mtp_loss_weight", 0), ("num_mtp_layers", 0)):
        value = getattr(config, name)
        if _is_number(value) and not (value >= least and math.isfinite(value)):
            lines.append(f"{name}: must not be below {least}, and finite, found {value}")
    cap = config.logit_softcap
    if _is_number(cap) and not 0 < cap < math.inf:
        lines.append(f"logit_softcap: must be greater than 0 and finite, or null; found {cap}")
    if isinstance(config.mtp_layout, str) and layers:
        lines += _wrong_mtp_layout(config)
    if not lines and layers:
        lines += base_problems(config)
    return lines


def _wrong_mtp_layout(config: HybridConfig) -> list[str]:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
