"""Data types of a layout: symbols, layers, and the parsed stack."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybrid.layout.errors import LayoutError, quote
from hybrid.layout.shortest import shortest

MAX_DEPTH = 100_000
"""Maximum number of layers. A larger layout is an error, raised before expansion."""

FFN = {"-": "the dense feed-forward", "E": "the mixture-of-experts feed-forward"}
"""Symbols of feed-forwards, which cannot be bound to a mixer."""


def is_mixer(char: str) -> bool:
    """Return whether a character can be the symbol of a mixer: any letter but "E", and "*"."""
    return (char.isalpha() or char == "*") and char not in FFN


def check_symbol(symbol: str) -> None:
    """Check that ``symbol`` may be bound to a mixer: one letter other than "E", or "*".

    Raises:
        LayoutError: it may not be bound.
    """
    expected = "one letter other than 'E', or '*'"
    if not isinstance(symbol, str) or len(symbol) != 1:
        raise LayoutError("a symbol is one character", expected, str(symbol), None, "symbol")
    if symbol in FFN:
        problem = f"'{symbol}' is {FFN[symbol]} in every layout and cannot be bound to a mixer"
        raise LayoutError(problem, expected, symbol, 0, "symbol")
    if not is_mixer(symbol):
        raise LayoutError(f"{quote(symbol)} is no symbol", expected, symbol, 0, "symbol")


@dataclass(frozen=True)
class Layer:
    """One layer: a mixer, a feed-forward, or a mixer followed by a feed-forward.

    Args:
        mixers: symbols of the token mixers. Several mixers run in parallel on the same input, and
            their outputs are combined. () for a layer with only a feed-forward.
        ffn: "-" (dense), "E" (mixture of experts), or None for no feed-forward.

    Raises:
        LayoutError: an invalid symbol, or an empty layer.
    """

    mixers: tuple[str, ...] = ()
    ffn: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mixers, tuple):
            raise LayoutError("mixers is no tuple", 'a tuple: Layer(("L",))', repr(self.mixers))
        for symbol in self.mixers:
            check_symbol(symbol)
        if self.ffn is not None and self.ffn not in tuple(FFN):
            raise LayoutError(
                "no such feed-forward", "'-', 'E' or None", repr(self.ffn), None, "ffn"
            )
        if not self.mixers and self.ffn is None:
            raise LayoutError("a layer with nothing in it", "a mixer or a feed-forward", repr(self))

    def __str__(self) -> str:
        mixers = "".join(self.mixers)
        return (f"[{mixers}]" if len(mixers) > 1 else mixers) + (self.ffn or "")


@dataclass(frozen=True, repr=False)
class Layout:
    """Parsed layout. Layouts with equal layers are equal, independent of the string.

    ``str(layout)`` is the shortest string that parses to this layout, for up to 256 layers. For
    more layers it is the result of a greedy search, never longer than ``source``. Among equally
    short strings, the one with the fewest counts is chosen.

    Args:
        layers: one entry per layer, each either mixers or a feed-forward, never both
            (``resolve`` pairs them).

    Raises:
        LayoutError: no layers, more than MAX_DEPTH, or a layer that has mixers and a feed-forward.
    """

    layers: tuple[Layer, ...]
    source: str = field(default="", init=False, compare=False)
    """Original string, for error messages; "" if there was none."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MAX_DEPTH:
            raise LayoutError(
                f"{len(self.layers):,} layers", f"between 1 and {MAX_DEPTH:,} layers", self.source
            )
        for layer in set(self.layers):
            if layer.mixers and layer.ffn:
                raise LayoutError(
                    "a layer of a mixer and a feed-forward has no symbol of its own",
                    "two layers, or the mixer alone and `resolve(layout, ffn=...)`",
                    str(layer),
                )

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        names = {layer: str(layer) for layer in set(self.layers)}
        text = shortest(tuple(names[layer] for layer in self.layers))
        written = "".join(self.source.split())
        return written if written and len(written) < len(text) else text

    def __repr__(self) -> str:
        return f"parse({str(self)!r})"

    @property
    def names_ffn(self) -> bool:
        """Whether the layout contains feed-forwards and is therefore taken literally."""
        return any(layer.ffn for layer in self.layers)

    def symbols(self) -> tuple[str, ...]:
        """Return the distinct mixer symbols in order of first appearance."""
        return tuple(dict.fromkeys(s for layer in self.layers for s in layer.mixers))
