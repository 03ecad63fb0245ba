"""Docstrings laid out for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator


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
