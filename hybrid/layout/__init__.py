"""The layout language: one string for a whole stack of layers.

    layout = { item }
    item   = ( symbol | "[" symbol symbol ... "]" | "(" layout ")" ) [ count ]
    symbol = a letter or "*" (a mixer) | "-" (dense feed-forward) | "E" (mixture of experts)

    LLLS      four layers, each a mixer; ``resolve`` adds a feed-forward after each one
    (GGGS)12  a repeated group           L7S   a repeated symbol (a count has no "*")
    [MS]4     parallel mixers in one layer, here four such layers
    M-M-M*-   contains feed-forwards, so it is taken literally: each symbol is one layer

White space is ignored, except inside a count. The config binds symbols to mixers. This package
does not use the registry.
"""

from hybrid.layout.errors import LayoutError
from hybrid.layout.parser import parse, parse_ffn
from hybrid.layout.stack import DEFAULT, DEFAULT_FFN, Row, check_bound, describe, resolve
from hybrid.layout.types import FFN, MAX_DEPTH, Layer, Layout, check_symbol

__all__ = [
    "DEFAULT",
    "DEFAULT_FFN",
    "FFN",
    "MAX_DEPTH",
    "Layer",
    "Layout",
    "LayoutError",
    "Row",
    "check_bound",
    "check_symbol",
    "describe",
    "parse",
    "parse_ffn",
    "resolve",
]
