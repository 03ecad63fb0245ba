"""Error of the layout language."""

from __future__ import annotations

import unicodedata

_WINDOW = 35  # characters shown on each side of a caret in a long string


class LayoutError(ValueError):
    """Error for an invalid layout. Its message shows the string, the column, and what was expected.

    Attributes: ``problem`` (what is wrong), ``expected`` (what would be right), ``text`` (the
    string), ``column`` (index into ``text``, from 0, or None if no one place is wrong) and
    ``name`` (which setting the string was: "layout", "ffn" or "symbol").
    """

    def __init__(
        self,
        problem: str,
        expected: str,
        text: str,
        column: int | None = None,
        name: str = "layout",
    ):
        # All arguments go to ``args``, so that the error survives pickling between processes.
        super().__init__(problem, expected, text, column, name)
        self.problem, self.expected, self.text = problem, expected, text
        self.column, self.name = column, name

    def __str__(self) -> str:
        column = self.column or 0
        start, stop = max(0, column - _WINDOW), column + _WINDOW
        lead = "..." if start else ""
        shown = lead + _printable(self.text[start:stop]) + ("..." if stop < len(self.text) else "")
        if self.column is None:
            return f"{self.name}: {self.problem}\n    {shown}\nexpected {self.expected}"
        indent = len(lead) + sum(map(_width, _printable(self.text[start:column])))
        return (
            f"{self.name}, column {column + 1}: {self.problem}\n"
            f"    {shown}\n    {' ' * indent}^\nexpected {self.expected}"
        )


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def _width(char: str) -> int:
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def quote(char: str) -> str:
    """Quote a character, with its Unicode name if it can be confused (Cyrillic M for M)."""
    if char.isascii():
        return repr(char)
    return f"'{_printable(char)}' ({unicodedata.name(char, f'U+{ord(char):04X}')})"
