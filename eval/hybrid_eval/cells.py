"""Scores of single cells of a result, e.g. at one length or depth."""

import math
from collections.abc import Mapping
from typing import Any

from .pool import score_of
from .seeds import Score

Record = dict[str, Any]


def cell_score(result: Record, where: Mapping[str, float]) -> Score:
    """Return the accuracy of the cells with these values, with their items.

    Args:
        result: result of a task.
        where: e.g. ``{"length": 256, "depth": 0.5}``; empty for the headline figure.

    Raises:
        ValueError: the cell does not exist; the message has the existing values.
    """
    if not where:
        return score_of(result)
    cells = result.get("cells") or []
    chosen = [i for i, cell in enumerate(cells) if _at(cell, where)]
    if not chosen:
        raise ValueError(f"{result['task']}: no cell with {_words(where)}; {_there(cells, where)}")
    values = [float(cells[i]["accuracy"]) for i in chosen]
    counts = [int(cell.get("n", 0)) for cell in cells]
    items = result.get("items") or []
    own: list[float] = []
    # items are in the order of the cells
    if sum(counts) == len(items):
        starts = [sum(counts[:i]) for i in range(len(counts))]
        own = [item for i in chosen for item in items[starts[i] : starts[i] + counts[i]]]
    return Score(math.fsum(values) / len(values), tuple(own), True)


def _at(cell: Record, where: Mapping[str, float]) -> bool:
    return all(key in cell and math.isclose(cell[key], value) for key, value in where.items())


def _words(where: Mapping[str, float]) -> str:
    return ", ".join(f"{key}={value:g}" for key, value in where.items())


def _there(cells: list[Record], where: Mapping[str, float]) -> str:
    """Return the existing values of these keys as text."""
    known = {key: sorted({cell[key] for cell in cells if key in cell}) for key in where}
    return "; ".join(
        f"{key}: {', '.join(f'{value:g}' for value in values) or 'none'}"
        for key, values in known.items()
    )
