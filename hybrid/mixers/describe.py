"""The mixers in a terminal: `hybrid mixers` and `hybrid mixers NAME`."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator

from rich.console import Console
from rich.table import Column, Table

from hybrid.config.registry import mixers


def print_mixers(console: Console) -> None:
    """A table of all mixers: symbol, name, gate, paper."""
    column = Column("mixer", no_wrap=True)  # whole, to be typed again
    table = Table("symbol", column, "gate", "paper")
    for cls in mixers.classes():
        table.add_row(cls.symbol or "", cls.name, cls.formula, cls.paper)
    console.print(table)


def print_mixer(name: str, console: Console) -> None:
    """The documentation of one mixer and a table of its options with their defaults.

    Args:
        name: of the mixer, or its symbol.
        console: where it goes.

    Raises:
        ValueError: no mixer has the name.
    """
    cls = mixers.get(mixers.symbols().get(name, name))
    texts = [f"{cls.name} ({cls.symbol})" if cls.symbol else cls.name, inspect.getdoc(cls)]
    for options in reversed(cls.Options.__mro__):  # what is shared stands above what adds to it
        if dataclasses.is_dataclass(options) and dataclasses.fields(options):
            texts.append(inspect.getdoc(options))
    folded = fold("\n\n".join(filter(None, texts)), console.width)
    console.print(folded, "", sep="\n", soft_wrap=True, highlight=False)
    table = Table("option", "default")
    for field in dataclasses.fields(cls.Options):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        table.add_row(field.name, str(default))
    console.print(table)


def fold(text: str, width: int) -> str:
    """A docstring in lines of at most `width`, as far as words allow, none shorter than it must be.

    What begins at the margin is a paragraph up to the next blank line. An indented line is an entry,
    such as that of an argument, and the lines behind it that are indented further belong to it.
    """
    return "\n".join(
        textwrap.fill(
            " ".join(lines),
            max(width, 20),
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + 4 if indent else 0),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for indent, lines in _pieces(text)
    )


def _pieces(text: str) -> Iterator[tuple[int, list[str]]]:
    """(indentation, lines) of each paragraph, entry and blank line."""
    indent = 0
    lines: list[str] = []
    for line in text.splitlines():
        here = len(line) - len(line.lstrip())
        continues = here > indent if indent else not here
        if not (lines and lines[0] and line.strip() and continues):
            if lines:
                yield indent, lines
            indent, lines = here, []
        lines.append(line.strip())
    if lines:
        yield indent, lines
