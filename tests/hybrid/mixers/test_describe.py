"""Docstrings for a terminal."""

import textwrap
from itertools import pairwise

import pytest

from hybrid.mixers.describe import fold

TEXT = """\
A sentence that goes over the end of
its line, and [brackets]
as they are.

Attributes:
    first: what it is, in a line
        and a half.
    second: a formula,
        x_{t-1} * (1 - beta), stays in one
        piece with its words.

The end."""


@pytest.mark.parametrize("width", [24, 40, 79, 200])
def test_lines_are_as_full_as_the_width_allows(width):
    folded = fold(TEXT, width)
    assert folded.split() == TEXT.split()
    blocks = [block.splitlines() for block in folded.split("\n\n")]
    assert len(blocks) == 3
    head, *entries = blocks[1]
    assert head == "Attributes:"
    begins = [i for i, line in enumerate(entries) if line.startswith("    ") and line[4] != " "]
    assert [entries[i].split()[0] for i in begins] == ["first:", "second:"]
    ends = [*begins[1:], len(entries)]
    pieces = [blocks[0], blocks[2], *(entries[a:b] for a, b in zip(begins, ends, strict=True))]
    for piece in pieces:
        for line, below in pairwise(piece):
            assert len(line) <= width
            assert len(line) + 1 + len(below.split()[0]) > width, (line, below)


def test_a_long_word_is_not_cut():
    word = "hybrid.mixers.rotation-and-more"
    assert fold(f"See {word}.", 20) == f"See\n{word}."


def test_what_fits_stays_as_it_is():
    assert fold(TEXT.replace("\n        ", " "), 80) == textwrap.dedent(
        """\
        A sentence that goes over the end of its line, and [brackets] as they are.

        Attributes:
            first: what it is, in a line and a half.
            second: a formula, x_{t-1} * (1 - beta), stays in one piece with its words.

        The end."""
    )
