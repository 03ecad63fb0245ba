"""The layout language: one string for a whole stack of layers.

    layout = { item }
    item   = ( symbol | "[" symbol symbol ... "]" | "(" layout ")" ) [ count ]
    symbol = a letter or "*" (a mixer) | "-" (dense feed-forward) | "E" (mixture of experts)

    LLLS      four layers, each a mixer; `resolve` lays a feed-forward after each one
    (GGGS)12  a group, repeated          L7S   a symbol, repeated (a count never has a "*")
    [MS]4     mixers side by side in one layer, here four such layers
    M-M-M*-   names its feed-forwards, so it is taken literally: each symbol is a layer of its own

White space is ignored, but not inside a count. Which mixer a symbol stands for is the config's
business: nothing here knows the registry.
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
