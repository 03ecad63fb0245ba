"""Look-up of settings per symbol: options of one mixer, one feed-forward, one residual branch.

These functions also accept a config that has not been validated. The whole stack is
resolved in ``hybrid.config.spec``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybrid.config.block_options import ResidualOptions, SharedOptions, pick
from hybrid.config.declare import build
from hybrid.config.fields import StackFields
from hybrid.config.registry import Registry, feed_forwards, mixers
from hybrid.layout import Layer, resolve


def bindings(fields: StackFields, name: str) -> dict[str, dict]:
    """Return the well-formed bindings of ``mixers`` or ``feed_forwards``."""
    values = getattr(fields, name)
    values = values if isinstance(values, dict) else {}
    return {s: v for s, v in values.items() if isinstance(s, str) and isinstance(v, dict)}


def bound_class(fields: StackFields, name: str, registry: Registry, symbol: str) -> type:
    """Return the class bound to a symbol."""
    kind = bindings(fields, name).get(symbol, {}).get("type")
    return registry.get(kind or registry.symbols()[symbol])


def layers_of(fields: StackFields) -> tuple[Layer, ...]:
    """Return the layers of the layout, each with its feed-forward."""
    ffn = fields.ffn if isinstance(fields.ffn, Mapping) else fields.ffn or ""
    return resolve(fields.layout, ffn=ffn, num_hidden_layers=fields.num_hidden_layers)


def mixer_of(fields: StackFields, symbol: str) -> tuple[type, Any]:
    """Return the mixer class of a symbol and its completed options."""
    cls, options = _binding(fields, "mixers", mixers, symbol, input_size(fields, symbol))
    if "B" in canon_at(fields, symbol):
        options = dataclasses.replace(options, conv_size=fields.canon_width)
    base = fields.mup_base_width
    if base is not None:
        width = base * input_size(fields, symbol) // fields.hidden_size
        options = options.scaled_from(_binding(fields, "mixers", mixers, symbol, width)[1])
    return cls, options


def feed_forward_of(fields: StackFields, symbol: str) -> tuple[type, Any]:
    """Return the feed-forward class of a symbol and its completed options."""
    return _binding(fields, "feed_forwards", feed_forwards, symbol, fields.hidden_size)


def _binding(
    fields: StackFields, name: str, registry: Registry, symbol: str, width: int
) -> tuple[Any, Any]:
    values = dict(bindings(fields, name).get(symbol, {}))
    values.pop("type", None)
    cls: Any = bound_class(fields, name, registry, symbol)
    return cls, build(cls.Options, values, f"{name}.{symbol}", []).complete(width)


def norm_position_at(fields: StackFields, *symbols: str) -> str:
    """Return the norm position of a residual branch, for the first of its symbols with a setting."""
    return pick(fields.norm_position, symbols, "pre")


def residual_at(fields: StackFields, *symbols: str) -> ResidualOptions:
    """Return the multipliers of a residual branch that the config sets."""
    return ResidualOptions(**pick(fields.residuals, symbols, {}))


def canon_at(fields: StackFields, *symbols: str) -> str:
    """Return the canon positions for the first of the symbols with a setting."""
    return "".join(sorted(pick(fields.canon, symbols, "")))


def canon_of(fields: StackFields, layer: Layer) -> str:
    """Return the positions at which a layer has a separate convolution: A, C, D."""
    before = canon_at(fields, *layer.mixers) if layer.mixers else ""
    around = canon_at(fields, layer.ffn, *layer.mixers) if layer.ffn else ""
    return "".join(at for at in "ACD" if at in (before if at == "A" else around))


def shared_at(fields: StackFields, *symbols: str) -> SharedOptions | None:
    """Return how the layers of a symbol share weights, or None without sharing."""
    values = pick(fields.shared, symbols, None)
    return None if values is None else SharedOptions(**values)


def input_size(fields: StackFields, *symbols: str) -> int:
    """Return the input width of a mixer: D, or 2 D with concatenated embeddings."""
    shared = shared_at(fields, *symbols)
    return fields.hidden_size * (2 if shared is not None and shared.concat_embeddings else 1)
