"""Resolution of a layout to the layers of a model, and their description."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, groupby
from typing import NamedTuple

from hybrid.layout.errors import LayoutError, quote
from hybrid.layout.parser import parse, parse_ffn
from hybrid.layout.types import FFN, MAX_DEPTH, Layer, Layout, check_symbol

DEFAULT_FFN = "-"
"""Default feed-forward pattern: a dense feed-forward after each mixer."""


DEFAULT = "default"
"""Key of all other layers in a pattern by symbol."""


def resolve(
    layout: Layout | str,
    ffn: str | Mapping[str, str] = DEFAULT_FFN,
    num_hidden_layers: int | None = None,
) -> tuple[Layer, ...]:
    """Resolve a layout to a stack: repeat it to the depth, and add a feed-forward after each mixer.

    Args:
        layout: a layout or its string.
        ffn: pattern of feed-forwards for a layout of mixers only, laid cyclically from the first
            layer: "-" dense everywhere, "-E" dense and experts in turn, "-E19" dense first in a
            stack of 20, "" none at all. Or a pattern by mixer symbol, laid cyclically over the
            layers of that symbol, "default" for those that are not named: {"S": "E", "default":
            "-"}; a layer of several mixers uses the first of its letters with an entry. A layout
            that names its own feed-forwards takes none, so ``ffn`` must be left at its default
            there.
        num_hidden_layers: depth, in layers; the layout is repeated to fill it. None: the layout's
            own length. A cycle that should end early is written out: "(KKKX)6 KKX".

    Returns:
        The layers, first to last.

    Raises:
        LayoutError: the depth is no multiple of the layout's length, the pattern is longer than
            the stack, or ``ffn`` is set together with a layout that names feed-forwards.
    """
    layout = layout if isinstance(layout, Layout) else parse(layout)
    layers = _fill(layout, num_hidden_layers)
    patterns = _patterns(ffn)
    text = layout.source or str(layout)
    if layout.names_ffn:
        if patterns != {DEFAULT: parse_ffn(DEFAULT_FFN)}:
            raise LayoutError(
                f"names its own feed-forwards, yet ffn={ffn!r} asks for more",
                "one or the other: leave ffn out, or take '-' and 'E' out of the layout",
                text,
                min(text.find(c) for c in FFN if c in text),
            )
        return layers
    keys = [next((s for s in layer.mixers if s in patterns), DEFAULT) for layer in layers]
    for key, pattern in patterns.items():
        if len(pattern) > keys.count(key) > 0:
            raise LayoutError(
                f"a pattern of {len(pattern)} feed-forwards for {keys.count(key)} layers, layout"
                f" {text!r}",
                f"{keys.count(key)} or fewer, which then repeat; shorten the pattern or deepen the"
                " layout",
                ffn if isinstance(ffn, str) else str(ffn[key]),
                None,
                "ffn" if isinstance(ffn, str) else f"ffn.{key}",
            )
    laid = {key: cycle(pattern or (None,)) for key, pattern in patterns.items()}
    return tuple(_paired(layers, [next(laid[key]) for key in keys]))


def _patterns(ffn: str | Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the feed-forward patterns by symbol."""
    if not isinstance(ffn, Mapping):
        return {DEFAULT: parse_ffn(ffn)}
    patterns = {DEFAULT: parse_ffn(DEFAULT_FFN)}
    for symbol, pattern in ffn.items():
        if symbol != DEFAULT:
            check_symbol(symbol)
        patterns[symbol] = parse_ffn(pattern)
    return patterns


def _paired(layers: Iterable[Layer], laid: Iterable[str | None]) -> Iterator[Layer]:
    """Yield each layer with its feed-forward; equal layers are one object."""
    made: dict[tuple[Layer, str | None], Layer] = {}
    for layer, ffn in zip(layers, laid, strict=True):
        yield made.setdefault((layer, ffn), Layer(layer.mixers, ffn))


def _fill(layout: Layout, depth: int | None) -> tuple[Layer, ...]:
    if depth is None:
        return layout.layers
    length, text = len(layout), layout.source or str(layout)
    if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= MAX_DEPTH:
        raise LayoutError(
            f"num_hidden_layers={depth!r}", f"an integer from 1 to {MAX_DEPTH:,}, or None", text
        )
    if depth % length:
        cycles, rest = divmod(depth, length)
        below = max(cycles, 1) * length
        parts = (layout.layers * cycles, layout.layers[:rest])
        written = " ".join(str(Layout(part)) for part in parts if part)
        raise LayoutError(
            f"{length} layers do not fill num_hidden_layers={depth} evenly",
            f"num_hidden_layers={below} or {below + length}; or all {depth} layers written out, with"
            f" the tail that is meant, e.g. {written}",
            text,
        )
    return layout.layers * (depth // length)


def check_bound(layout: Layout, known: Iterable[str]) -> None:
    """Check that every mixer symbol of ``layout`` is among the ``known`` ones.

    Args:
        layout: a parsed layout.
        known: the symbols that mean something, such as the keys of a registry.

    Raises:
        LayoutError: one is not; a caret under its first use, and the nearest known symbol.
    """
    known = sorted(set(known))
    for symbol in layout.symbols():
        if symbol in known:
            continue
        expected = f"one of {', '.join(known)}" if known else "no symbol, for none is known"
        expected += f"; or bind {symbol} to a mixer in the config"
        nearest = [k for k in known if k.casefold() == symbol.casefold()]
        if nearest:
            expected = f"{nearest[0]} (did you mean it?), or else {expected}"
        elif symbol == "*":
            expected += "; in Megatron-LM and Nemotron-H strings '*' is softmax attention"
        text = layout.source or str(layout)
        problem = f"unknown symbol {quote(symbol)}"
        raise LayoutError(problem, expected, text, text.index(symbol))


class Row(NamedTuple):
    """A run of equal layers, as one line of a table (see ``describe``)."""

    layers: str
    """Index range, from 0, both ends included: "7" or "0-6"."""
    mixers: tuple[str, ...]
    """Symbols side by side in each layer; () for a layer of a feed-forward alone."""
    ffn: str | None
    """The feed-forward: "-", "E" or None."""
    repeated: int
    """How many layers the run has."""


def describe(layers: Sequence[Layer]) -> list[Row]:
    """Describe a stack (of ``resolve``, or ``Layout.layers``) as a table, equal neighbours merged."""
    rows, start = [], 0
    for layer, run in groupby(layers):
        count = len(list(run))
        span = str(start) if count == 1 else f"{start}-{start + count - 1}"
        rows.append(Row(span, layer.mixers, layer.ffn, count))
        start += count
    return rows
