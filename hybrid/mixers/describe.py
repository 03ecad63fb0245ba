"""Output of the commands `hybrid mixers` and `hybrid mixers NAME`."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator

from rich.console import Console
from rich.table import Column, Table

from hybrid.config.registry import mixers


def print_mixers(console: Console) -> None:
    """Print a table of all mixers: symbol, name, gate, paper."""
    column = Column("mixer", no_wrap=True)  # names stay whole, so that users can copy them
    table = Table("symbol", column, "gate", "paper")
    for cls in mixers.classes():
        table.add_row(cls.symbol or "", cls.name, cls.formula, cls.paper)
    console.print(table)


def print_mixer(name: str, console: Console) -> None:
    """Print the documentation of one mixer and a table of its options with their defaults.

    Args:
        name: name or symbol of the mixer.
        console: console to print to.

    Raises:
        ValueError: no mixer has this name.
    """
    cls = mixers.get(mixers.symbols().get(name, name))
    texts = [f"{cls.name} ({cls.symbol})" if cls.symbol else cls.name, inspect.getdoc(cls)]
    for options in reversed(cls.Options.__mro__):  # options of base classes first
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
    """Wrap a docstring to lines of at most ``width`` characters. Words are not split.

    Lines without indentation form a paragraph up to the next blank line. An indented line starts an
    entry, such as an argument. The following lines with more indentation belong to that entry.
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
    """Yield (indentation, lines) of each paragraph, entry and blank line."""
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
