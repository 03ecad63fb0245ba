"""Settings by symbol: what a config says about one mixer, one feed-forward, one residual branch.

A config may be asked before it is known to be right, which validation does. The stack as a whole is
resolved in `hybrid.config.spec`.
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
    """What the config binds in `mixers` or `feed_forwards`, as far as it is well-formed."""
    values = getattr(fields, name)
    values = values if isinstance(values, dict) else {}
    return {s: v for s, v in values.items() if isinstance(s, str) and isinstance(v, dict)}


def bound_class(fields: StackFields, name: str, registry: Registry, symbol: str) -> type:
    """The class that a symbol stands for."""
    kind = bindings(fields, name).get(symbol, {}).get("type")
    return registry.get(kind or registry.symbols()[symbol])


def layers_of(fields: StackFields) -> tuple[Layer, ...]:
    """The layers of the layout, each with its feed-forward."""
    ffn = fields.ffn if isinstance(fields.ffn, Mapping) else fields.ffn or ""
    return resolve(fields.layout, ffn=ffn, num_hidden_layers=fields.num_hidden_layers)


def mixer_of(fields: StackFields, symbol: str) -> tuple[type, Any]:
    """The mixer class of a symbol, and its completed options."""
    cls, options = _binding(fields, "mixers", mixers, symbol, input_size(fields, symbol))
    if "B" in canon_at(fields, symbol):
        options = dataclasses.replace(options, conv_size=fields.canon_width)
    base = fields.mup_base_width
    if base is not None:
        width = base * input_size(fields, symbol) // fields.hidden_size
        options = options.scaled_from(_binding(fields, "mixers", mixers, symbol, width)[1])
    return cls, options


def feed_forward_of(fields: StackFields, symbol: str) -> tuple[type, Any]:
    """The feed-forward class of a symbol, and its completed options."""
    return _binding(fields, "feed_forwards", feed_forwards, symbol, fields.hidden_size)


def _binding(
    fields: StackFields, name: str, registry: Registry, symbol: str, width: int
) -> tuple[Any, Any]:
    values = dict(bindings(fields, name).get(symbol, {}))
    values.pop("type", None)
    cls: Any = bound_class(fields, name, registry, symbol)
    return cls, build(cls.Options, values, f"{name}.{symbol}", []).complete(width)


def norm_position_at(fields: StackFields, *symbols: str) -> str:
    """Where the norms of a residual branch are, for the first of its symbols that is named."""
    return pick(fields.norm_position, symbols, "pre")


def residual_at(fields: StackFields, *symbols: str) -> ResidualOptions:
    """The multipliers of a residual branch, as far as the config names them."""
    return ResidualOptions(**pick(fields.residuals, symbols, {}))


def canon_at(fields: StackFields, *symbols: str) -> str:
    """The positions of canon layers, for the first of the symbols that is named."""
    return "".join(sorted(pick(fields.canon, symbols, "")))


def canon_of(fields: StackFields, layer: Layer) -> str:
    """The positions at which a layer has a convolution of its own: A, C, D."""
    before = canon_at(fields, *layer.mixers) if layer.mixers else ""
    around = canon_at(fields, layer.ffn, *layer.mixers) if layer.ffn else ""
    return "".join(at for at in "ACD" if at in (before if at == "A" else around))


def shared_at(fields: StackFields, *symbols: str) -> SharedOptions | None:
    """How the layers of a symbol share weights; None where each has its own."""
    values = pick(fields.shared, symbols, None)
    return None if values is None else SharedOptions(**values)


def input_size(fields: StackFields, *symbols: str) -> int:
    """Channels that a mixer reads: D, or 2 D with the embeddings beside."""
    shared = shared_at(fields, *symbols)
    return fields.hidden_size * (2 if shared is not None and shared.concat_embeddings else 1)
