"""Parser of layout strings."""

from __future__ import annotations

from collections.abc import Iterator

from hybrid.layout.errors import LayoutError, quote
from hybrid.layout.types import FFN, MAX_DEPTH, Layer, Layout, is_mixer

_DIGITS = frozenset("0123456789")

# Characters that people paste or type out of habit, and what to do about each.
_WAYS_OUT = {
    "|": "in Megatron-LM strings '|' splits the stack into pipeline stages; remove it",
    "/": "in Megatron-LM strings '/' starts the multi-token-prediction (MTP) suffix; "
    "remove it and what follows it",
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "a dense feed-forward is a plain '-'"),
    **dict.fromkeys("\u00d7^", "a count stands right after its item: L7, (LLLS)10"),
    **dict.fromkeys("{}<>", "groups are written with ( ), parallel mixers with [ ]"),
    **dict.fromkeys(",;_+.:", "items need nothing between them; remove it"),
    **dict.fromkeys("'\"", "remove the quotation mark"),
}


class _Parser:
    """Parser of one string in one pass, without recursion: groups are a stack of (index, column)."""

    def __init__(self, text: object, name: str):
        if not isinstance(text, str):
            raise LayoutError(
                f"must be a string, got {type(text).__name__}",
                "a string; in YAML put it in quotes, since - [ * and bare numbers mean other "
                "things there",
                repr(text),
                None,
                name,
            )
        self.text, self.name = text, name
        self.layers: list[Layer] = []

    def error(self, problem: str, expected: str, column: int) -> LayoutError:
        return LayoutError(problem, expected, self.text, column, self.name)

    def parse(self) -> list[Layer]:
        known: dict[str, Layer] = {}  # equal layers share one object
        groups: list[tuple[int, int]] = []  # (layers before it, its column), one per open "("
        item: int | None = None  # where in ``layers`` the item starts that a count would repeat
        after_count = False
        for column, token in self._tokens():
            first = token[0]
            if first in _DIGITS:
                if item is None:
                    raise self._stray_count(after_count, column)
                self._repeat(item, token, column)
                item, after_count = None, True
                continue
            after_count = False
            if first == "(":
                groups.append((len(self.layers), column))
                item = None
            elif first == ")":
                item = self._close(groups, column)
            else:
                item = len(self.layers)
                self._check_depth(item + 1, column)
                if token not in known:
                    known[token] = self._layer(token, column)
                self.layers.append(known[token])
        if groups:
            raise self.error(
                f"the '(' of column {groups[-1][1] + 1} is never closed", "')'", len(self.text)
            )
        return self.layers

    def _tokens(self) -> Iterator[tuple[int, str]]:
        """Yield (column, token): one character, a whole count, or "[" with its symbols."""
        text, column = self.text, 0
        while column < len(text):
            start, char = column, text[column]
            column += 1
            if char in _DIGITS:
                while column < len(text) and text[column] in _DIGITS:
                    column += 1
                yield start, text[start:column]
            elif char == "[":
                symbols, column = self._bracket(start)
                yield start, "[" + symbols
            elif not char.isspace():
                if not (char in "()" or char in FFN or is_mixer(char)):
                    raise self._unexpected(char, start)
                yield start, char

    def _bracket(self, start: int) -> tuple[str, int]:
        """Read ``[MS]`` from the column of its "["; return its symbols and the column after it."""
        symbols: list[str] = []
        for column in range(start + 1, len(self.text)):
            char = self.text[column]
            if is_mixer(char):
                symbols.append(char)
            elif char == "]" and len(symbols) > 1:
                return "".join(symbols), column + 1
            elif char == "]":
                way_out = f"; for one mixer write {symbols[0]}" if symbols else ""
                raise self.error(
                    "brackets hold two or more mixers", f"another mixer{way_out}", column
                )
            elif char in _WAYS_OUT:
                raise self._unexpected(char, column)
            elif not char.isspace():
                raise self.error(
                    f"found {quote(char)} between brackets, which hold mixers and nothing else",
                    "a mixer or ']'; write a mixer twice to have it twice, put a count after the "
                    "']', and a feed-forward in the ffn pattern or as a layer of its own",
                    column,
                )
        raise self.error(f"the '[' of column {start + 1} is never closed", "']'", len(self.text))

    def _layer(self, token: str, column: int) -> Layer:
        if token in FFN:
            return Layer((), token)
        if self.name == "ffn":
            raise self.error(
                f"{quote(token[0])} is no feed-forward",
                "'-' (dense), 'E' (mixture of experts), groups and counts of them, or \"\" for "
                "no feed-forward; mixers belong in the layout",
                column,
            )
        return Layer(tuple(token.lstrip("[")))

    def _close(self, groups: list[tuple[int, int]], column: int) -> int:
        if not groups:
            raise self.error(
                "')' closes nothing", "a '(' somewhere before it, or no ')' here", column
            )
        start, _ = groups.pop()
        if start == len(self.layers):
            raise self.error("an empty group", "at least one symbol between '(' and ')'", column)
        return start

    def _repeat(self, start: int, digits: str, column: int) -> None:
        significant = digits.lstrip("0")
        if not significant:
            raise self.error(
                "nothing can be repeated 0 times", "a count of 1 or more, or no item", column
            )
        layers = self.layers
        # A number of that many digits is too large, and slow or refused by int().
        too_long = len(significant) > len(str(MAX_DEPTH))
        count = MAX_DEPTH + 1 if too_long else int(significant)
        # ``layers`` holds every group still open, so this bounds the whole stack, not one group.
        self._check_depth(len(layers) + (len(layers) - start) * (count - 1), column)
        layers.extend(layers[start:] * (count - 1))

    def _check_depth(self, depth: int, column: int) -> None:
        if depth > MAX_DEPTH:
            raise self.error("too many layers", f"{MAX_DEPTH:,} layers at the most in all", column)

    def _stray_count(self, after_count: bool, column: int) -> LayoutError:
        if after_count:
            return self.error(
                "a count after a count", "one count for each item, written without a gap", column
            )
        return self.error(
            "a count with nothing to repeat", "a symbol or a group before the count", column
        )

    def _unexpected(self, char: str, column: int) -> LayoutError:
        if char == "]":
            return self.error(
                "']' closes nothing", "a '[' somewhere before it, or no ']' here", column
            )
        symbols = "'-' or 'E'" if self.name == "ffn" else "a letter, '*', '-', '['"
        expected = f"{symbols}, '(', ')' or a count"
        if char in _WAYS_OUT:
            expected += f": {_WAYS_OUT[char]}"
        return self.error(f"unexpected {quote(char)}", expected, column)


def parse(text: str) -> Layout:
    """Parse a layout string.

    Args:
        text: the layout, such as "LLLS", "(L7 S)10", "[MS]24" or "M-M-M*-".

    Returns:
        One entry per layer, counts and groups expanded. Symbols need not be bound to anything
        yet: see ``check_bound``.

    Raises:
        LayoutError: ``text`` is not a layout; the message has a caret under the column. Time and
            memory are linear in the length of any text plus MAX_DEPTH.
    """
    layers = _Parser(text, "layout").parse()
    if not layers:
        raise LayoutError("an empty layout", "at least one symbol, such as S or LLLS", text, 0)
    layout = Layout(tuple(layers))
    # Not an argument of Layout, so that dataclasses.replace cannot carry a stale one along.
    object.__setattr__(layout, "source", text)
    return layout


def parse_ffn(text: str) -> tuple[str, ...]:
    """Parse a feed-forward pattern: a layout of only "-" and "E", such as "-E19" or "(-E)16".

    Returns:
        "-" or "E" for each place of the pattern; () for "", which means no feed-forward.

    Raises:
        LayoutError: anything else.
    """
    return tuple(layer.ffn or "" for layer in _Parser(text, "ffn").parse())
